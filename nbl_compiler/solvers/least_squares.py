"""The linear minimum mean squared error map of NBL (arXiv 2505.21077, section 3.1) and its errors.

    W = C_YX (C_XX + ρ diag C_XX)⁻¹,   b = E[Y] − W E[X]

Solved in float64 in the eigenbasis of the correlation matrix of x, in which every ridge ρ costs
one d × d product; so ρ can be chosen on held-out rows. Eigenvalues below a floor (directions the
data never showed) are left out, which makes fewer rows than dimensions harmless.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nbl_compiler.solvers.moments import Moments

# Relative to the largest eigenvalue of the correlation matrix. Products are taken in float32
# (2⁻²⁴ relative per block, averaged over blocks); what is smaller is rounding, not data.
EIGENVALUE_FLOOR = 1e-8
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
        rank: Number of directions of x above the eigenvalue floor.
    """

    weight: Tensor
    bias: Tensor
    nmse: float
    holdout_nmse: float
    ridge: float
    rank: int


@dataclass(frozen=True)
class _Basis:
    """x in units in which its training covariance is diagonal."""

    transform: Tensor  # [d, r]: x ↦ xᵀ transform
    eigenvalues: Tensor  # [r]
    coefficients: Tensor  # [d_out, r]: C_YX in this basis


def fit_linear(
    train: Moments, holdout: Moments | None = None, ridge: float | Literal["auto"] = "auto"
) -> LinearFit:
    """Return the best affine map from x to y.

    Args:
        train: Moments of the rows to fit.
        holdout: Moments of other rows, which choose the ridge and report the error.
        ridge: ρ ≥ 0, relative to each input's variance, or ``"auto"``.
    """
    own = train.centred()
    basis = _basis(own)
    usable = holdout if holdout is not None and holdout.count >= MIN_HOLDOUT_ROWS else None
    error = _HoldoutError(basis, own, usable) if usable is not None else _CrossValidation(basis, own)
    chosen = min(RIDGES, key=error) if ridge == "auto" else float(ridge)
    shrunk = basis.coefficients * _inverse(basis.eigenvalues, chosen)
    weight = shrunk @ basis.transform.T
    total = float(own.yy.sum()) / max(own.count, 1)
    explained = float((shrunk * (2 * basis.coefficients - shrunk * basis.eigenvalues)).sum())
    return LinearFit(
        weight=weight,
        bias=own.shift_y - weight @ own.shift_x,
        nmse=_ratio(max(total - explained, 0.0), total),
        holdout_nmse=error(chosen),
        ridge=chosen,
        rank=basis.eigenvalues.numel(),
    )


def _inverse(eigenvalues: Tensor, ridge: float) -> Tensor:
    """Return 1 / (λ + ρ); eigenvalues are of the correlation matrix, so ρ is relative."""
    return 1.0 / (eigenvalues + ridge)


def _basis(centred: Moments) -> _Basis:
    n = max(centred.count, 1)
    scale = (centred.xx.diagonal() / n).clamp_min(0).sqrt()
    inverse_scale = torch.where(scale > 0, 1 / scale.clamp_min(1e-300), torch.zeros_like(scale))
    correlation = centred.xx / n * inverse_scale[:, None] * inverse_scale
    values, vectors = torch.linalg.eigh((correlation + correlation.T) / 2)
    seen = values > EIGENVALUE_FLOOR * values[-1].clamp_min(1e-300)
    transform = inverse_scale[:, None] * vectors[:, seen]
    return _Basis(transform, values[seen], centred.yx / n @ transform)


class _HoldoutError:
    """NMSE on held-out rows as a function of the ridge, one r × r product a call."""

    def __init__(self, basis: _Basis, train: Moments, holdout: Moments) -> None:
        about = holdout.about(train.shift_x, train.shift_y, holdout.shift_t)
        n = about.count
        a = basis.coefficients
        self._eigenvalues = basis.eigenvalues
        self._square = (a.T @ a) * (basis.transform.T @ (about.xx / n) @ basis.transform)
        self._cross = (a * (about.yx / n @ basis.transform)).sum(0)
        self._energy = float(about.yy.sum()) / n
        self._total = float(holdout.centred().yy.sum()) / n

    def __call__(self, ridge: float) -> float:
        s = _inverse(self._eigenvalues, ridge)
        error = self._energy - 2 * float(self._cross @ s) + float(s @ self._square @ s)
        return _ratio(max(error, 0.0), self._total)


class _CrossValidation:
    """Generalised cross-validation (Golub, Heath and Wahba 1979) on the training rows."""

    def __init__(self, basis: _Basis, train: Moments) -> None:
        self._basis, self._count = basis, max(train.count, 1)
        self._total = float(train.yy.sum()) / self._count

    def __call__(self, ridge: float) -> float:
        values, a = self._basis.eigenvalues, self._basis.coefficients
        shrunk = a * _inverse(values, ridge)
        error = self._total - float((shrunk * (2 * a - shrunk * values)).sum())
        freedom = 1 + float((values * _inverse(values, ridge)).sum())
        left = 1 - freedom / self._count
        if left <= 0:
            return float("inf")
        return _ratio(max(error, 0.0) / left**2, self._total)


def _ratio(error: float, total: float) -> float:
    if total > 0:
        return error / total
    return 0.0 if error == 0 else float("inf")
