"""The canonical-correlation bound by which NBL ranks layers (arXiv 2505.21077, theorem 3.2).

    NMSE(Ŷ) ≤ Σ_i (1 − ρ_i²),   ρ = singular values of C_TT^(−1/2) C_TX C_XX^(−1/2)

with T = Y + residual, the updated stream, as in the paper's released code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nbl_compiler.solvers.least_squares import EIGENVALUE_FLOOR
from nbl_compiler.solvers.moments import Moments


def cca_bound(moments: Moments) -> float:
    """Return Σ (1 − ρ_i²) over the directions of T that the rows show.

    Args:
        moments: Training moments of one site.

    Returns:
        A number in [0, d_out]: 0 where the updated stream is a linear function of the input.
    """
    own = moments.centred()
    left, right = _inverse_root(own.tt), _inverse_root(own.xx)
    squared_correlations = (left.T @ own.tx @ right).square().sum()  # Σ ρ_i² = ‖·‖_F²
    return max(left.shape[1] - float(squared_correlations), 0.0)


def _inverse_root(covariance: Tensor) -> Tensor:
    """Return S with S Sᵀ = pseudo-inverse of the covariance, of full column rank."""
    scale = covariance.diagonal().clamp_min(0).sqrt()
    inverse_scale = torch.where(scale > 0, 1 / scale.clamp_min(1e-300), torch.zeros_like(scale))
    correlation = covariance * inverse_scale[:, None] * inverse_scale
    values, vectors = torch.linalg.eigh((correlation + correlation.T) / 2)
    seen = values > EIGENVALUE_FLOOR * values[-1].clamp_min(1e-300)
    return inverse_scale[:, None] * vectors[:, seen] * values[seen].rsqrt()
