"""Exact maximum errors of affine approximations a·z + c of an activation on [lo, hi].

The error σ(z) − a·z − c has its extremes at lo, hi, a breakpoint of σ (a kink or a root of σ'') or
a solution of σ'(z) = a, of which every monotone piece of σ' holds at most one. All of them are
found in float64, vectorised over neurons, and the maximum is widened by a bound on the rounding
of its own evaluation, so that it is an upper bound on the exact error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nbl_compiler.solvers.activations import Activation

_HALVINGS = 64
"""Bisection runs on the 64-bit patterns of float64, so 64 halvings end at adjacent numbers."""

ROUNDING = 16 * torch.finfo(torch.float64).eps
"""Relative slack per evaluation. σ, σ' and the two products and sums around them take fewer than
eight operations or library calls of at most 4 units in the last place (half an eps) each."""


def max_affine_error(
    activation: Activation, lo: Tensor, hi: Tensor, slope: Tensor, intercept: Tensor
) -> Tensor:
    """Maximum over z in [lo, hi] of |σ(z) − slope·z − intercept|, per neuron.

    Args:
        activation: σ.
        lo: Left ends, any shape that broadcasts with the others; −∞ is allowed.
        hi: Right ends, at least ``lo``; +∞ is allowed.
        slope: a, finite.
        intercept: c, finite.

    Returns:
        float64 tensor of the broadcast shape: an upper bound that exceeds the exact maximum by no
        more than the rounding slack (a few hundred float64 roundings of the terms involved). It
        is infinite where the error is unbounded.

    Raises:
        ValueError: if a range is empty or NaN, or a slope or intercept is not finite.
    """
    (intercept,) = _as_float64(intercept)
    if not bool(intercept.isfinite().all()):
        raise ValueError("intercepts must be finite")
    extremes = affine_residual_extremes(activation, lo, hi, slope)
    # Subnormal values round by more than their share: the least normal number covers them.
    slack = extremes.slack + ROUNDING * intercept.abs() + torch.finfo(torch.float64).tiny
    return torch.maximum(intercept - extremes.lowest, extremes.highest - intercept) + slack


@dataclass(frozen=True)
class ResidualExtremes:
    """The least and the greatest σ(z) − slope·z on [lo, hi], per neuron; all float64.

    Args:
        lowest: Minimum (infimum at an infinite end).
        highest: Maximum (supremum at an infinite end).
        lowest_at: z of the minimum.
        highest_at: z of the maximum.
        slack: Bound on the rounding error of ``lowest`` and ``highest``.
    """

    lowest: Tensor
    highest: Tensor
    lowest_at: Tensor
    highest_at: Tensor
    slack: Tensor


def affine_residual_extremes(
    activation: Activation, lo: Tensor, hi: Tensor, slope: Tensor
) -> ResidualExtremes:
    """Minimum and maximum over z in [lo, hi] of σ(z) − slope·z, and where they are.

    Arguments, shapes and errors as :func:`max_affine_error`.
    """
    lo, hi, slope = _as_float64(lo, hi, slope)
    if bool((~(lo <= hi)).any()):
        raise ValueError("empty range: every lo must be at most its hi, and neither NaN")
    if not bool(slope.isfinite().all()):
        raise ValueError("slopes must be finite")
    interior = stationary_points(activation, lo, hi, slope)
    points = torch.cat(
        [lo[..., None], breakpoints_within(activation, lo, hi), interior, hi[..., None]], -1
    )
    finite = points.isfinite()
    z, a = torch.where(finite, points, 0.0), slope[..., None]
    value = activation(z)
    residual = torch.where(finite, value - a * z, _limits(activation, points > 0, a.expand_as(z)))
    residual = residual.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)  # overflow
    lowest, lowest_index = residual.min(-1)
    highest, highest_index = residual.max(-1)
    # First term: rounding of the residual; σ itself loses up to min(|z|, 1) roundings at z < 0,
    # where its argument is rounded before a steep exponential. Second: |σ' − a| is zero at the
    # stationary point only up to its rounding, over at most the width that was searched.
    rounding = (z.abs().clamp_max(1) + value.abs() + (a * z).abs()).amax(-1)
    width = interior.amax(-1) - interior.amin(-1)
    return ResidualExtremes(
        lowest=lowest,
        highest=highest,
        lowest_at=points.gather(-1, lowest_index[..., None])[..., 0],
        highest_at=points.gather(-1, highest_index[..., None])[..., 0],
        slack=ROUNDING * (rounding + (1 + slope.abs()) * width),
    )


def stationary_points(activation: Activation, lo: Tensor, hi: Tensor, slope: Tensor) -> Tensor:
    """Where σ'(z) − slope changes sign in [lo, hi], one column for each monotone piece of σ'.

    Returns:
        float64 ``[..., len(activation.breakpoints) + 1]``. A piece without such a point gives the
        end of its part of [lo, hi] that comes closest; a piece outside [lo, hi] gives lo or hi.
    """
    lo, hi, slope = _as_float64(lo, hi, slope)
    edges = torch.tensor(activation.breakpoints, dtype=torch.float64, device=lo.device)
    left = torch.cat([lo[..., None], edges.expand(*lo.shape, -1)], -1)
    right = torch.cat([edges.expand(*lo.shape, -1), hi[..., None]], -1)
    floor = torch.full_like(lo, activation.tails[0]).clamp(lo, hi)[..., None]
    ceiling = torch.full_like(hi, activation.tails[1]).clamp(lo, hi)[..., None]
    left, right = left.clamp(floor, ceiling), right.clamp(floor, ceiling)
    return _bisect(activation, left, right, slope[..., None])


def breakpoints_within(activation: Activation, lo: Tensor, hi: Tensor) -> Tensor:
    """The breakpoints of σ, those outside moved to the nearer end: [..., breakpoints] float64."""
    edges = torch.tensor(activation.breakpoints, dtype=torch.float64, device=lo.device)
    return edges.expand(*lo.shape, -1).clamp(lo[..., None], hi[..., None])


def _limits(activation: Activation, positive: Tensor, slope: Tensor) -> Tensor:
    """Limit of σ(z) − slope·z at −∞ or (where ``positive``) at +∞."""
    limits = []
    for line, side in zip(activation.asymptotes, (-1.0, 1.0), strict=True):
        if line is None:
            limits.append(torch.full_like(slope, torch.inf))
            continue
        difference = line[0] - slope
        limits.append(torch.where(difference == 0, line[1], side * difference * torch.inf))
    return torch.where(positive, limits[1], limits[0])


def _bisect(activation: Activation, left: Tensor, right: Tensor, slope: Tensor) -> Tensor:
    """The sign change of σ' − slope between ``left`` and ``right``, on which σ' is monotone."""
    rising = activation.derivative(right) >= activation.derivative(left)
    low, high = _ordered_bits(left), _ordered_bits(right)
    for _ in range(_HALVINGS):
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        below = (activation.derivative(_from_ordered_bits(middle)) < slope) == rising
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return _from_ordered_bits(high)


def _ordered_bits(z: Tensor) -> Tensor:
    """The int64 whose order is the order of the float64 (IEEE 754 sign-magnitude, unfolded)."""
    bits = z.contiguous().view(torch.int64)
    return torch.where(bits < 0, bits ^ 0x7FFF_FFFF_FFFF_FFFF, bits)


def _from_ordered_bits(bits: Tensor) -> Tensor:
    return torch.where(bits < 0, bits ^ 0x7FFF_FFFF_FFFF_FFFF, bits).view(torch.float64)


def _as_float64(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.broadcast_tensors(*(tensor.to(torch.float64) for tensor in tensors)))
