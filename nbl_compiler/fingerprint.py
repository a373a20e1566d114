"""Recognising the weights a plan was calibrated on.

Each parameter W is reduced to its shape, its norm and one bilinear sketch qᵀWp with fixed p and q.
A changed, permuted or re-trained weight changes the sketch; a cast to a shorter dtype moves it by
no more than that dtype's rounding, so a plan survives ``model.to(torch.bfloat16)``. Names play no
part: a wrapped model, or the base model alone, is recognised as well.

Rounding to int8 moves both by more than other weights might: a merged adapter, say. But it leaves
every row's greatest magnitude as it was, since the row's scale is made of it. So these are sketched
as well, and must agree as exactly as floats must.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from nbl_compiler.int8_weights import LEVELS, Int8Matrix, int8_of, is_quantized
from nbl_compiler.solvers.precision import full_precision
from nbl_compiler.tensor_parallel import is_spread, whole

# Sketches of the same values differ by float32 summation order: √N rounding steps of 2⁻²⁴.
SAME_DTYPE_TOLERANCE = 1e-5
# Rounding to a shorter dtype moves each weight by at most eps/2 of itself, independently of the
# pattern: the norm by at most eps/2, the sketch by about eps/4 (one standard deviation: eps/10).
ROUNDING_SAFETY = 2.0
# Rounding to int8 is an error E of ‖E‖² = Σ step²/12 that is independent of the pattern: it moves
# the sketch by half of ‖E‖ (one standard deviation), the norm by less.
INT8_SAFETY = 4.0

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
        peaks: Of a matrix, the norm of its rows' greatest magnitudes m, and their sketch qᵀm. None
            of other shapes, and in plans of older releases.
        step: ‖E‖ as expected of rounding to int8; 0 if the weight is not held as int8.
    """

    shape: tuple[int, ...]
    dtype: str
    norm: float
    value: float
    peaks: tuple[float, float] | None = None
    step: float = 0.0

    def header(self) -> list[object]:
        """Return what a plan keeps, as plain values (those of an older release lack peaks)."""
        known = [] if self.peaks is None else [list(self.peaks)]
        return [list(self.shape), self.dtype, self.norm, self.value, *known]

    @classmethod
    def of_header(cls, given: Sequence[Any]) -> Sketch:
        """Undo ``header``."""
        shape, dtype, norm, value, *peaks = given
        if not peaks:
            return cls(tuple(shape), dtype, norm, value)
        ((size, pattern),) = peaks
        return cls(tuple(shape), dtype, norm, value, (size, pattern))

    def matches(self, other: Sketch) -> bool:
        """Tell whether both came from the same weights, up to a change of dtype, or to int8."""
        if self.shape != other.shape:
            return False
        quantized = self.step > 0.0 or other.step > 0.0
        tolerance = SAME_DTYPE_TOLERANCE
        # The scales of int8 are rounded to the weight's own dtype.
        if self.dtype != other.dtype or quantized:
            eps = max(torch.finfo(getattr(torch, d)).eps for d in (self.dtype, other.dtype))
            tolerance = max(tolerance, ROUNDING_SAFETY * eps)
        slack = INT8_SAFETY * max(self.step, other.step)
        mine, theirs = (self.norm, self.value), (other.norm, other.value)
        if not _agree(mine, theirs, tolerance, slack):
            return False
        if not quantized:
            return True
        if self.peaks is None or other.peaks is None:
            return False
        return _agree(self.peaks, other.peaks, tolerance)


def _agree(
    mine: tuple[float, float], theirs: tuple[float, float], tolerance: float, slack: float = 0.0
) -> bool:
    """Compare a norm and a sketch of that size with others."""
    allowed = tolerance * max(mine[0], theirs[0]) + slack
    return all(abs(a - b) <= allowed for a, b in zip(mine, theirs, strict=True))


def sketch(weight: Tensor) -> Sketch:
    """Return the sketch of a parameter (remembered until the parameter changes)."""
    key = _key(weight)
    known = _cache.get(weight)
    if known is not None and known[0] == key:
        result = known[1]
        assert isinstance(result, Sketch)
        return result
    result = _of_int8(weight) if is_quantized(weight) else _compute(whole(weight.detach()))
    _cache[weight] = (key, result)
    return result


def _key(weight: Tensor) -> _Key:
    """Return what changes when the weight does."""
    held = weight.to_local() if is_spread(weight) else weight
    if is_quantized(weight):
        held = int8_of(weight, "a weight").codes
    version = 0 if held.is_inference() else held._version  # inference tensors count nothing
    return version, held.data_ptr(), weight.dtype


def remember_sketch(weight: Tensor, known: Sketch) -> None:
    """Go on recognising a weight whose values are about to be, or were, let go of."""
    _cache[weight] = (_key(weight), known)


def _compute(weight: Tensor) -> Sketch:
    rows = weight.reshape(-1, weight.shape[-1]) if weight.ndim > 1 else weight.reshape(1, -1)
    if rows.dtype not in (torch.float32, torch.float64):
        rows = rows.float()
    right = _pattern(rows.shape[1], rows)
    left = _pattern(rows.shape[0], rows)
    with full_precision(rows.device):
        value = float(left.double() @ (rows @ right).double())
    dtype = str(weight.dtype).removeprefix("torch.")
    norm = float(torch.linalg.vector_norm(rows))
    peaks = _peaks(rows.abs().amax(dim=1)) if weight.ndim == 2 and rows.numel() else None
    return Sketch(tuple(weight.shape), dtype, norm, value, peaks)


def _of_int8(weight: Tensor) -> Sketch:
    matrix = int8_of(weight, "a weight")
    made = _compute(matrix.dequantized())
    dtype = str(weight.dtype).removeprefix("torch.")
    peaks = _peaks(matrix.scale * LEVELS)
    return replace(made, dtype=dtype, peaks=peaks, step=_rounding(matrix))


def _peaks(greatest: Tensor) -> tuple[float, float]:
    """Return norm and sketch of the rows' greatest magnitudes [n]."""
    wide = greatest.double()
    return float(wide.norm()), float(_pattern(len(wide), wide) @ wide)


def _rounding(matrix: Int8Matrix) -> float:
    """Return ‖E‖ of a rounding error that is uniform over each step."""
    return float(matrix.scale.double().norm()) * sqrt(matrix.codes.shape[1] / 12)


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
