"""Least-squares fits of an FFN's neurons or output, from streaming moments alone.

    v ≈ A u + b,   A = A₀ + (C_vu − A₀ C_uu) (C_uu + ρ diag C_uu)⁻¹,   b = E[v] − A E[u]

the linear minimum mean squared error (LMMSE) map with a ridge ρ towards a prior A₀. The ridge is
relative to each regressor's variance, so it means the same for inputs and neurons of any scale.
Solved in float64 in the eigenbasis of the correlation matrix, in which every ρ is cheap and can
be chosen on held-out moments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nbl_compiler.solvers.ffn_moments import KeptMoments, RegressionMoments

EIGENVALUE_FLOOR = 1e-8
"""Directions whose eigenvalue is smaller, relative to the largest of the correlation matrix, are
rounding of the float32 products and not data; the map ignores them. So fewer tokens than
regressors are harmless."""

RIDGES: tuple[float, ...] = (0.0, *(10.0 ** (k / 2) for k in range(-12, 2)))
"""Ridges tried by ``"auto"``: half decades from 1e−6 to about 3, and none."""

DEFAULT_RIDGE = 1e-2
"""``"auto"`` without held-out moments."""

MIN_HOLDOUT_TOKENS = 32
"""Fewer held-out tokens than this cannot choose a ridge; they still report their error."""


@dataclass(frozen=True)
class AffineMap:
    """v ≈ weight @ u + bias.

    Args:
        weight: [q, p] float64.
        bias: [q] float64.
        residual: Training mean squared error of each output, [q] float64.
        nmse: Training error, Σ E[r²] / Σ Var[v] (weighted if the fit was).
        holdout_nmse: The same on the held-out moments; NaN without any.
        ridge: The ρ used.
    """

    weight: Tensor
    bias: Tensor
    residual: Tensor
    nmse: float
    holdout_nmse: float
    ridge: float


@dataclass(frozen=True)
class _Basis:
    """Regressors in units in which their training covariance is diagonal."""

    transform: Tensor  # [p, r]: u ↦ transformᵀ u
    eigenvalues: Tensor  # [r]
    coefficients: Tensor  # [q, r]: what the prior leaves of C_vu, in this basis

    def step(self, ridge: float) -> Tensor:
        """The shrunk change to the prior, [q, p]."""
        return (self.coefficients / (self.eigenvalues + ridge)) @ self.transform.T


def squared_errors(moments: RegressionMoments, weight: Tensor, bias: Tensor) -> Tensor:
    """E[(v − weight u − bias)²] of each output, [q] float64, from the moments alone.

    Its own rounding is that of float32 products, about 1e−7 of E[v²].
    """
    covariance, cross = moments.input_covariance, moments.cross_covariance
    variance = (
        moments.target_variance
        - 2 * (weight * cross).sum(1)
        + ((weight @ covariance) * weight).sum(1)
    )
    offset = moments.target_mean - weight @ moments.input_mean - bias
    return variance.clamp_min(0) + offset.square()


def fit_affine_map(
    train: RegressionMoments,
    holdout: RegressionMoments | None = None,
    *,
    ridge: float | Literal["auto"] = "auto",
    prior: Tensor | None = None,
    free: int | None = None,
    output_weights: Tensor | None = None,
    ridges: Sequence[float] = RIDGES,
) -> AffineMap:
    """The affine map of least mean squared error, shrunk towards a prior.

    Args:
        train: Moments of (u [p], v [q]).
        holdout: Moments of other tokens; they choose the ridge.
        ridge: ρ ≥ 0, or ``"auto"``.
        prior: A₀ [q, p], zero without.
        free: Only the first ``free`` columns may leave the prior.
        output_weights: [q], importance of each output in the NMSE and in the choice of the ridge
            (with one ridge they do not change the map).
        ridges: What ``"auto"`` chooses from.
    """
    p, q = train.inputs, train.targets
    free = p if free is None else free
    covariance = train.input_covariance
    start = torch.zeros(q, p).to(covariance) if prior is None else prior.to(covariance)
    importance = (
        torch.ones(q).to(covariance) if output_weights is None else output_weights.to(covariance)
    )
    basis = _basis(
        covariance[:free, :free], (train.cross_covariance - start @ covariance)[:, :free]
    )
    if ridge != "auto":
        chosen = float(ridge)
    elif holdout is not None and holdout.count >= MIN_HOLDOUT_TOKENS:
        chosen = _best_ridge(basis, train, holdout, start, importance, ridges)
    else:
        chosen = DEFAULT_RIDGE
    weight = start.clone()
    weight[:, :free] += basis.step(chosen)
    bias = train.target_mean - weight @ train.input_mean
    residual = squared_errors(train, weight, bias)
    return AffineMap(
        weight=weight,
        bias=bias,
        residual=residual,
        nmse=_weighted_nmse(train, residual, importance),
        holdout_nmse=float("nan")
        if holdout is None
        else _weighted_nmse(holdout, squared_errors(holdout, weight, bias), importance),
        ridge=chosen,
    )


def fit_output(
    train: KeptMoments,
    kept_columns: Tensor,
    holdout: KeptMoments | None = None,
    *,
    refit: bool = True,
    ridge: float | Literal["auto"] = "auto",
) -> AffineMap:
    """Fit the FFN's output y ≈ M x + V z_K + b, with a ridge on V towards the original columns.

    Args:
        train: Moments of ((x, z_K), y).
        kept_columns: W2[:, K], [o, k], the prior of V.
        holdout: Held-out moments of the same, to choose the ridge.
        refit: Solve for M, V and b jointly; without, V stays at the original columns and only
            M and b are solved for (for the same ridge that is the fold of the per-neuron fits).
        ridge: As in :func:`fit_affine_map`.

    Returns:
        Map whose weight is [M | V], [o, d + k].
    """
    d = train.model_size
    prior = torch.zeros(train.targets, train.inputs).to(train.input_mean)
    prior[:, d:] = kept_columns.to(prior)
    free = train.inputs if refit else d
    return fit_affine_map(train, holdout, ridge=ridge, prior=prior, free=free)


def _basis(covariance: Tensor, remaining: Tensor) -> _Basis:
    scale = covariance.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale)).nan_to_num(posinf=0.0)
    values, vectors = torch.linalg.eigh(covariance * inverse[:, None] * inverse)
    if values.numel() == 0:
        return _Basis(vectors, values, remaining @ vectors)
    seen = (values > EIGENVALUE_FLOOR * values[-1]) & (values > 0)
    transform = inverse[:, None] * vectors[:, seen]
    return _Basis(transform, values[seen], remaining @ transform)


def _best_ridge(
    basis: _Basis,
    train: RegressionMoments,
    holdout: RegressionMoments,
    prior: Tensor,
    weights: Tensor,
    ridges: Sequence[float],
) -> float:
    """The ridge of least held-out error; after one r × r product every candidate costs r²."""
    free = basis.transform.shape[0]
    du = holdout.input_mean - train.input_mean
    dv = holdout.target_mean - train.target_mean
    # About the training means, where the map's bias is zero.
    covariance = holdout.input_covariance + torch.outer(du, du)
    cross = holdout.cross_covariance + torch.outer(dv, du) - prior @ covariance
    a = basis.coefficients
    gain = ((a * weights[:, None]) * (cross[:, :free] @ basis.transform)).sum(0)
    square = (a.T @ (a * weights[:, None])) * (
        basis.transform.T @ covariance[:free, :free] @ basis.transform
    )

    def error(ridge: float) -> float:
        s = 1 / (basis.eigenvalues + ridge)
        return float(s @ square @ s - 2 * (gain @ s))

    return min(ridges, key=error)


def _weighted_nmse(moments: RegressionMoments, errors: Tensor, weights: Tensor) -> float:
    return _ratio(float(weights @ errors), float(weights @ moments.target_variance))


def _ratio(error: float, total: float) -> float:
    if total > 0:
        return error / total
    return 0.0 if error == 0 else float("inf")
