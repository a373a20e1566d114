"""Recognising the weights a plan was calibrated on.

Each parameter W is reduced to its shape, its norm and one bilinear sketch qᵀWp with fixed p and q.
A changed, permuted or re-trained weight changes the sketch; a cast to a shorter dtype moves it by
no more than that dtype's rounding, so a plan survives ``model.to(torch.bfloat16)``. Names play no
part: a wrapped model, or the base model alone, is recognised as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from nbl_compiler.solvers.precision import full_precision
from nbl_compiler.tensor_parallel import is_spread, whole

# Sketches of the same values differ by float32 summation order: √N rounding steps of 2⁻²⁴.
SAME_DTYPE_TOLERANCE = 1e-5
# Rounding to a shorter dtype moves each weight by at most eps/2 of itself, independently of the
# pattern: the norm by at most eps/2, the sketch by about eps/4 (one standard deviation: eps/10).
ROUNDING_SAFETY = 2.0

_Key = tuple[int, int, torch.dtype]
_cache: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass(frozen=True)
class Sketch:
    """What is kept of one parameter.

    Args:
        shape: Shape of the parameter.
        dtype: Name of its dtype, such as ``"float32"``.
        norm: Frobenius norm.
        value: The bilinear sketch.
    """

    shape: tuple[int, ...]
    dtype: str
    norm: float
    value: float

    def matches(self, other: Sketch) -> bool:
        """Tell whether both came from the same weights, up to a change of dtype."""
        if self.shape != other.shape:
            return False
        tolerance = SAME_DTYPE_TOLERANCE
        if self.dtype != other.dtype:
            eps = max(torch.finfo(getattr(torch, d)).eps for d in (self.dtype, other.dtype))
            tolerance = max(tolerance, ROUNDING_SAFETY * eps)
        size = max(self.norm, other.norm)
        return (
            abs(self.norm - other.norm) <= tolerance * size
            and abs(self.value - other.value) <= tolerance * size
        )


def sketch(weight: Tensor) -> Sketch:
    """Return the sketch of a parameter (remembered until the parameter changes)."""
    version = 0 if weight.is_inference() else weight._version  # inference tensors count nothing
    place = weight.to_local().data_ptr() if is_spread(weight) else weight.data_ptr()
    key: _Key = (version, place, weight.dtype)
    known = _cache.get(weight)
    if known is not None and known[0] == key:
        result = known[1]
        assert isinstance(result, Sketch)
        return result
    result = _compute(whole(weight.detach()))
    _cache[weight] = (key, result)
    return result


def remember_sketch(weight: Tensor, known: Sketch) -> None:
    """Go on recognising a weight whose values are about to be, or were, let go of."""
    version = 0 if weight.is_inference() else weight._version
    _cache[weight] = ((version, weight.data_ptr(), weight.dtype), known)


def _compute(weight: Tensor) -> Sketch:
    rows = weight.reshape(-1, weight.shape[-1]) if weight.ndim > 1 else weight.reshape(1, -1)
    if rows.dtype not in (torch.float32, torch.float64):
        rows = rows.float()
    right = _pattern(rows.shape[1], rows)
    left = _pattern(rows.shape[0], rows)
    with full_precision(rows.device):
        value = float(left.double() @ (rows @ right).double())
    dtype = str(weight.dtype).removeprefix("torch.")
    return Sketch(tuple(weight.shape), dtype, float(torch.linalg.vector_norm(rows)), value)


def _pattern(size: int, like: Tensor) -> Tensor:
    """Return a fixed vector of entries of order one without symmetries."""
    steps = torch.arange(size, dtype=torch.float64, device=like.device)
    return torch.cos(steps * steps * 0.7548776662466927 + 0.5).to(like.dtype)


def find_stranger(weights: Mapping[str, Tensor], known: Iterable[Sketch]) -> str | None:
    """Return the name of the first weight that none of the known sketches match, or None."""
    by_shape: dict[tuple[int, ...], list[Sketch]] = {}
    for item in known:
        by_shape.setdefault(item.shape, []).append(item)
    for name, weight in weights.items():
        own = sketch(weight)
        if not any(own.matches(item) for item in by_shape.get(own.shape, ())):
            return name
    return None
