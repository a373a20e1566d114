"""The linear minimum mean squared error map of NBL (arXiv 2505.21077, section 3.1) and its errors.

    W = W₀ + (C_YX − W₀ C_XX) (C_XX + ρ diag C_XX)⁻¹,   b = E[Y] − W E[X]

with W₀ = 0, or a prior, whichever leaves less error on held-out rows.

Solved in float64 in the eigenbasis of the correlation matrix of x, in which every ridge ρ costs
one d × d product; so ρ can be chosen on held-out rows. Directions that the data never showed are
left out, which makes fewer rows than dimensions harmless.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nbl_compiler.solvers.moments import Moments

# Of the largest eigenvalue of the correlation matrix: below, float64 itself no longer resolves
# what the float32 products hold.
EIGENVALUE_FLOOR = 1e-8
# Rounding of one float32 product; a d × d matrix of it has eigenvalues of up to √d times that.
PRODUCT_ROUNDING = 2.0**-24
# A component whose standard deviation is below this fraction of its mean is constant: float32
# activations cannot show more (their own rounding is 6e-8 of the mean).
CONSTANT_SPREAD = 1e-6
RIDGES = (0.0, *(10.0 ** (k / 2) for k in range(-12, 3)))
# Fewer held-out rows than this cannot choose a ridge or rank a site; then generalised
# cross-validation on the training rows does.
MIN_HOLDOUT_ROWS = 32


@dataclass(frozen=True)
class LinearFit:
    """A solved map y = x @ weight.T + bias.

    Args:
        weight: [d_out, d], float64.
        bias: [d_out], float64.
        nmse: Training error, E‖y − ŷ‖² / E‖y − E y‖².
        holdout_nmse: The same on held-out rows, or estimated from the training rows by
            generalised cross-validation where there are none.
        ridge: The ρ that was used.
        shrunk_to_prior: Whether the ridge is towards the prior, not towards zero.
        rank: Number of directions of x above the eigenvalue floor.
    """

    weight: Tensor
    bias: Tensor
    nmse: float
    holdout_nmse: float
    ridge: float
    rank: int
    shrunk_to_prior: bool = False


@dataclass(frozen=True)
class _Basis:
    """x in units in which its training covariance is diagonal."""

    transform: Tensor  # [d, r]: x ↦ xᵀ transform
    eigenvalues: Tensor  # [r]
    coefficients: Tensor  # [d_out, r]: C_YX in this basis


@dataclass(frozen=True)
class Whitening:
    """Directions that rows show, each with unit scale per component.

    Args:
        transform: [d, r]; x ↦ (x − mean) @ transform has covariance diag(eigenvalues).
        eigenvalues: [r], of the correlation matrix, ascending, all above the floor.
    """

    transform: Tensor
    eigenvalues: Tensor


def whiten(products: Tensor, mean: Tensor, count: int) -> Whitening:
    """Return the directions in which centred rows really vary.

    Constant components and directions below the rounding of the products are left out; so with
    fewer rows than dimensions ``count − 1`` remain.

    Args:
        products: Sum of outer products of the centred rows, [d, d], float64.
        mean: Mean of the rows before centring, [d].
        count: Number of rows.
    """
    variance = (products.diagonal() / max(count, 1)).clamp_min(0)
    varies = variance > (CONSTANT_SPREAD * mean).square()
    inverse_scale = torch.where(varies, variance.clamp_min(1e-300).rsqrt(), 0.0)
    correlation = products / max(count, 1) * inverse_scale[:, None] * inverse_scale
    values, vectors = torch.linalg.eigh((correlation + correlation.T) / 2)
    noise = PRODUCT_ROUNDING * values.numel() ** 0.5
    seen = values > max(noise, EIGENVALUE_FLOOR * float(values[-1]))
    return Whitening(inverse_scale[:, None] * vectors[:, seen], values[seen])


def fit_linear(
    train: Moments,
    holdout: Moments | None = None,
    ridge: float | Literal["auto"] = "auto",
    prior: Tensor | None = None,
) -> LinearFit:
    """Return the best affine map from x to y.

    Args:
        train: Moments of the rows to fit.
        holdout: Moments of other rows, which choose the ridge and report the error.
        ridge: ρ ≥ 0, relative to each input's variance, or ``"auto"``.
        prior: W₀ [d_out, d]; it is used if that lowers the held-out error.
    """
    own = train.centred()
    white = whiten(own.xx, own.shift_x, own.count)
    usable = holdout if holdout is not None and holdout.count >= MIN_HOLDOUT_ROWS else None
    plain = _fit_towards(None, own, white, usable, ridge)
    if prior is None:
        return plain
    informed = _fit_towards(prior.to(own.xx), own, white, usable, ridge)
    return informed if informed.holdout_nmse < plain.holdout_nmse else plain


def _fit_towards(
    prior: Tensor | None,
    own: Moments,
    white: Whitening,
    holdout: Moments | None,
    ridge: float | Literal["auto"],
) -> LinearFit:
    """Fit what a prior leaves of y, or all of it; errors are relative to y itself."""
    left = own if prior is None else own.residual(prior)
    basis = _basis(left, white)
    total, rows = float(own.yy.sum()) / max(own.count, 1), own.shift_y
    error: Callable[[float], float]
    if holdout is None:
        error = _CrossValidation(basis, left, total, rows)
    else:
        other = holdout if prior is None else holdout.residual(prior)
        total_held = float(holdout.centred().yy.sum()) / holdout.count
        error = _HoldoutError(basis, left, other, total_held, holdout.mean_y)
    chosen = min(RIDGES, key=error) if ridge == "auto" else float(ridge)
    shrunk = basis.coefficients * _inverse(basis.eigenvalues, chosen)
    weight = shrunk @ basis.transform.T
    energy = float(left.yy.sum()) / max(own.count, 1)
    explained = float((shrunk * (2 * basis.coefficients - shrunk * basis.eigenvalues)).sum())
    if prior is not None:
        weight = weight + prior
    return LinearFit(
        weight=weight,
        bias=own.shift_y - weight @ own.shift_x,
        nmse=_ratio(energy - explained, total, own.shift_y),
        holdout_nmse=error(chosen),
        ridge=chosen,
        rank=basis.eigenvalues.numel(),
        shrunk_to_prior=prior is not None,
    )


def _inverse(eigenvalues: Tensor, ridge: float) -> Tensor:
    """Return 1 / (λ + ρ); eigenvalues are of the correlation matrix, so ρ is relative."""
    return 1.0 / (eigenvalues + ridge)


def _basis(centred: Moments, white: Whitening) -> _Basis:
    coefficients = centred.yx / max(centred.count, 1) @ white.transform
    return _Basis(white.transform, white.eigenvalues, coefficients)


class _HoldoutError:
    """NMSE on held-out rows as a function of the ridge, one r × r product a call."""

    def __init__(
        self, basis: _Basis, train: Moments, holdout: Moments, total: float, mean: Tensor
    ) -> None:
        about = holdout.about(train.shift_x, train.shift_y, holdout.shift_t)
        n = about.count
        a = basis.coefficients
        self._eigenvalues = basis.eigenvalues
        self._square = (a.T @ a) * (basis.transform.T @ (about.xx / n) @ basis.transform)
        self._cross = (a * (about.yx / n @ basis.transform)).sum(0)
        self._energy = float(about.yy.sum()) / n
        self._total, self._mean = total, mean

    def __call__(self, ridge: float) -> float:
        s = _inverse(self._eigenvalues, ridge)
        error = self._energy - 2 * float(self._cross @ s) + float(s @ self._square @ s)
        return _ratio(error, self._total, self._mean)


class _CrossValidation:
    """Generalised cross-validation (Golub, Heath and Wahba 1979) on the training rows."""

    def __init__(self, basis: _Basis, train: Moments, total: float, mean: Tensor) -> None:
        self._basis, self._count = basis, max(train.count, 1)
        self._energy = float(train.yy.sum()) / self._count
        self._total, self._mean = total, mean

    def __call__(self, ridge: float) -> float:
        values, a = self._basis.eigenvalues, self._basis.coefficients
        shrunk = a * _inverse(values, ridge)
        error = self._energy - float((shrunk * (2 * a - shrunk * values)).sum())
        freedom = 1 + float((values * _inverse(values, ridge)).sum())
        left = 1 - freedom / self._count
        if left <= 0:
            return float("inf")
        return _ratio(error / left**2, self._total, self._mean)


def _ratio(error: float, total: float, mean: Tensor) -> float:
    """Return error / total, where an output that does not vary beyond rounding has total 0."""
    rounding = float((CONSTANT_SPREAD * mean).square().sum())
    if total > rounding:
        return max(error, 0.0) / total
    return 0.0 if error <= rounding else float("inf")
