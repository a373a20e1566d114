"""Comparing what two runs of one graph returned."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

# Largest relative error that is put down to another order of summation, by the coarsest dtype.
_TOLERANCES = {
    torch.float64: 1e-7,
    torch.float32: 1e-3,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
_COARSEST = 0.25  # float8 and the like


def tolerance_for(values: Iterable[Any]) -> float:
    """Return the largest relative error that is rounding, for a graph that takes these values."""
    dtypes = [v.dtype for v in values if isinstance(v, Tensor) and v.is_floating_point()]
    known = [_TOLERANCES.get(dtype, _COARSEST) for dtype in dtypes]
    return max(known, default=_TOLERANCES[torch.float32])


def largest_error(expected: Any, actual: Any) -> float:
    """Return the largest relative error |actual - expected| / |expected| of any output.

    Args:
        expected: Outputs of a graph: tensors and numbers, nested.
        actual: Outputs of another run.

    Returns:
        Of floating-point tensors the ratio of Euclidean norms, over the elements that are finite.
        Infinite if shapes, dtypes, integers or the places of NaN and Inf differ.
    """
    left, right = tree_leaves(expected), tree_leaves(actual)
    if len(left) != len(right):
        return math.inf
    return max((_error(a, b) for a, b in zip(left, right, strict=True)), default=0.0)


def _error(expected: Any, actual: Any) -> float:
    if not isinstance(expected, Tensor) or not isinstance(actual, Tensor):
        same = type(expected) is type(actual) and expected == actual
        return 0.0 if same else math.inf
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return math.inf
    if not (expected.is_floating_point() or expected.is_complex()):
        return 0.0 if torch.equal(expected, actual) else math.inf
    return _relative(_wide(expected), _wide(actual))


def _wide(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor).double() if tensor.is_complex() else tensor.double()


def _relative(expected: Tensor, actual: Tensor) -> float:
    finite = expected.isfinite()
    if not torch.equal(finite, actual.isfinite()):
        return math.inf
    rest, other = expected[~finite], actual[~finite]
    if not torch.equal(rest.isnan(), other.isnan()):
        return math.inf
    if not torch.equal(rest.nan_to_num(), other.nan_to_num()):  # the signs of infinities
        return math.inf
    difference = float((actual[finite] - expected[finite]).norm())
    return difference / (float(expected[finite].norm()) or 1.0)


def holds_nan(values: Sequence[Any]) -> bool:
    """Tell whether one of the tensors holds a NaN."""
    return any(bool(v.isnan().any()) for v in _floating(values))


def holds_inf(values: Sequence[Any]) -> bool:
    """Tell whether one of the tensors holds an infinity."""
    return any(bool(v.isinf().any()) for v in _floating(values))


def _floating(values: Sequence[Any]) -> list[Tensor]:
    return [v for v in tree_leaves(values) if isinstance(v, Tensor) and v.is_floating_point()]
