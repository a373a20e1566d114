"""Affine fits a·z + c of an activation, per neuron: least squares and minimax.

Least squares minimises the error under the calibrated distribution of the pre-activation (TARDIS,
arXiv 2501.10054, fits each neuron on its hot range so); minimax minimises the largest error on the
range, and with it the certified bound of the folded FFN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nbl_compiler.solvers.activation_errors import (
    affine_residual_extremes,
    breakpoints_within,
    max_affine_error,
)
from nbl_compiler.solvers.activations import Activation

_SLOPE_HALVINGS = 44
"""Halvings of the slope interval; σ' spans about one unit, so the slope ends within 1e−13
and the error within 1e−13 of the width of the range."""

_FLAT = 1e-12
"""A range whose variance is below this fraction of its mean square holds a single value as far as
float64 moments can tell; its fit is the tangent."""


@dataclass(frozen=True)
class AffineFit:
    """σ(z) ≈ slope·z + intercept on [lo, hi], per neuron; all tensors [f] float64.

    Args:
        lo: Left ends of the ranges.
        hi: Right ends of the ranges.
        slope: a.
        intercept: c.
        max_error: Upper bound on |σ(z) − a·z − c| on [lo, hi], tight to rounding.
    """

    lo: Tensor
    hi: Tensor
    slope: Tensor
    intercept: Tensor
    max_error: Tensor


@dataclass(frozen=True)
class ActivationMoments:
    """Means over the pre-activations z of a neuron that fall in its range; all [...] float64.

    Args:
        weight: Share of all tokens that fall in the range.
        z: E[z].
        value: E[σ(z)].
        z_variance: Var[z].
        covariance: Cov[z, σ(z)].
        value_variance: Var[σ(z)].
    """

    weight: Tensor
    z: Tensor
    value: Tensor
    z_variance: Tensor
    covariance: Tensor
    value_variance: Tensor

    def affine(self, activation: Activation) -> tuple[Tensor, Tensor, Tensor]:
        """The least-squares (slope, intercept) and its mean squared error in the range.

        A range with (as good as) one value of z gets the tangent there.
        """
        flat = self.z_variance <= _FLAT * (self.z.square() + _FLAT)
        slope = torch.where(
            flat,
            activation.derivative(self.z),
            self.covariance / torch.where(flat, torch.ones_like(self.z), self.z_variance),
        )
        intercept = self.value - slope * self.z
        error = (self.value_variance - slope * self.covariance).clamp_min(0)
        return slope, intercept, torch.where(flat, torch.zeros_like(error), error)


def least_squares_affine(
    activation: Activation, lo: Tensor, hi: Tensor, moments: ActivationMoments
) -> AffineFit:
    """The affine fit of least mean squared error under a distribution on [lo, hi].

    Args:
        activation: σ.
        lo: Left ends, [f].
        hi: Right ends, [f].
        moments: Of the pre-activations inside [lo, hi]
            (:meth:`nbl_compiler.solvers.ranges.RangeHistogram.moments`). A neuron of weight 0
            gets the minimax fit.
    """
    lo, hi = lo.to(torch.float64), hi.to(torch.float64)
    slope, intercept, _ = moments.affine(activation)
    unseen = moments.weight <= 0
    if bool(unseen.any()):
        fallback = minimax_affine(activation, lo[unseen], hi[unseen])
        slope = slope.masked_scatter(unseen, fallback.slope)
        intercept = intercept.masked_scatter(unseen, fallback.intercept)
    error = max_affine_error(activation, lo, hi, slope, intercept)
    return AffineFit(lo, hi, slope, intercept, error)


def minimax_affine(activation: Activation, lo: Tensor, hi: Tensor) -> AffineFit:
    """The affine fit whose largest error on [lo, hi] is least (Chebyshev).

    For a slope a, the best intercept centres the residual σ(z) − a·z, leaving half its span as
    error. That span is convex in a, with derivative z_min − z_max, the distance between the
    points where the residual is least and greatest: its sign is bisected. At the optimum the
    residual reaches ± the error at three points or more, alternating (equioscillation).

    Args:
        activation: σ.
        lo: Left ends, finite, [f].
        hi: Right ends, finite, at least ``lo``, [f].

    Raises:
        ValueError: if a range is infinite, empty or NaN.
    """
    lo, hi = torch.broadcast_tensors(lo.to(torch.float64), hi.to(torch.float64))
    if not bool((lo.isfinite() & hi.isfinite()).all()):
        raise ValueError("a minimax fit needs finite ranges")
    low, high = _slope_bounds(activation, lo, hi)
    for _ in range(_SLOPE_HALVINGS):
        slope = low + (high - low) / 2
        extremes = affine_residual_extremes(activation, lo, hi, slope)
        # d(span)/d(slope) = z_lowest − z_highest.
        rising = extremes.lowest_at > extremes.highest_at
        low, high = torch.where(rising, low, slope), torch.where(rising, slope, high)
    slope = low + (high - low) / 2
    extremes = affine_residual_extremes(activation, lo, hi, slope)
    intercept = extremes.lowest + (extremes.highest - extremes.lowest) / 2
    error = max_affine_error(activation, lo, hi, slope, intercept)
    return AffineFit(lo, hi, slope, intercept, error)


def _slope_bounds(activation: Activation, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and greatest σ' on [lo, hi]; the minimax slope lies between them."""
    corners = breakpoints_within(activation, lo, hi)
    points = torch.cat([lo[..., None], corners, hi[..., None]], -1)
    derivative = activation.derivative(points)
    return derivative.amin(-1), derivative.amax(-1)
