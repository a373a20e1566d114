"""The canonical-correlation bound by which NBL ranks layers (arXiv 2505.21077, theorem 3.2).

    NMSE(Ŷ) ≤ Σ_i (1 − ρ_i²),   ρ = singular values of C_TT^(−1/2) C_TX C_XX^(−1/2)

with T = Y + residual, the updated stream, as in the paper's released code.
"""

from __future__ import annotations

from torch import Tensor

from nbl_compiler.solvers.least_squares import whiten
from nbl_compiler.solvers.moments import Moments


def cca_bound(moments: Moments) -> float:
    """Return Σ (1 − ρ_i²) over the directions of T that the rows show.

    Args:
        moments: Training moments of one site.

    Returns:
        A number in [0, d_out]: 0 where the updated stream is a linear function of the input.
    """
    own = moments.centred()
    n = max(own.count, 1)
    left, right = (
        _inverse_root(products, mean, own.count)
        for products, mean in ((own.tt, own.shift_t), (own.xx, own.shift_x))
    )
    squared_correlations = (left.T @ (own.tx / n) @ right).square().sum()  # Σ ρ_i² = ‖·‖_F²
    return max(left.shape[1] - float(squared_correlations), 0.0)


def _inverse_root(products: Tensor, mean: Tensor, count: int) -> Tensor:
    """Return S with S Sᵀ = pseudo-inverse of the covariance, of full column rank."""
    white = whiten(products, mean, count)
    return white.transform * white.eigenvalues.rsqrt()
