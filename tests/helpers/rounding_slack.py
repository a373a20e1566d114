"""What floating point can add to a certified error: the allowance of tests that try to break it."""

from __future__ import annotations

import torch
from torch import Tensor

from nbl_compiler.solvers.activation_errors import ROUNDING, max_affine_error
from nbl_compiler.solvers.activations import Activation, activation
from nbl_compiler.solvers.affine_fit import AffineFit
from nbl_compiler.solvers.folding import FFNWeights

_ELEMENTWISE = 16
"""Roundings charged to one evaluation of σ(z) − a·z − c with rounded a and c: three operations,
two rounded constants, and up to eight units in the last place for the library's σ."""


def rounding_slack(
    weights: FFNWeights,
    fit: AffineFit,
    x_norm: Tensor | float,
    dtype: torch.dtype = torch.float32,
    accumulate: torch.dtype | None = None,
) -> Tensor:
    """What rounding can add to |y − y_dense|, of both paths together: [..., o] float64.

    First-order forward error analysis (Higham, Accuracy and Stability of Numerical Algorithms,
    section 3.1: a dot product of n terms is wrong by at most γ_n Σ|terms|, γ_n = n·u / (1 − n·u))
    of z, σ(z), W2 σ(z), C x + B and the corrections, for sums in any order. A neuron whose z lies
    within rounding of an end of its range may be judged wrongly; that is included.

    Args:
        weights: The plain FFN.
        fit: The affine fits; slope and intercept 0 for kept neurons.
        x_norm: ‖x‖₂ of the inputs, [...].
        dtype: Of weights, activations and results.
        accumulate: Of the sums inside matrix products; by default ``dtype``, but float32 for
            half-precision types. TF32 products are outside this analysis.
    """
    if accumulate is None:
        accumulate = torch.promote_types(dtype, torch.float32)
    w1, w2 = weights.w1.double(), weights.w2.double().abs()
    (f, d), o = w1.shape, w2.shape[0]
    zeros = w1.new_zeros
    b1 = zeros(f) if weights.b1 is None else weights.b1.double().abs()
    b2 = zeros(o) if weights.b2 is None else weights.b2.double().abs()
    size = torch.as_tensor(x_norm, dtype=torch.float64, device=w1.device)[..., None]
    store, sums = torch.finfo(dtype).eps, torch.finfo(accumulate).eps / 2
    gamma_d, gamma_f = (n * sums / (1 - n * sums) + store for n in (d + 4, f + d + 8))

    reach = w1.square().sum(1).sqrt() * size + b1  # |z_i| at most
    z_error = gamma_d * reach
    sigma = activation(weights.activation)
    zero = torch.zeros_like(reach)
    span = reach + z_error
    largest = max_affine_error(sigma, -span, span, zero, zero)
    steepness = lipschitz(sigma, -span, span) + fit.slope.abs()
    affine = fit.slope.abs() * reach + fit.intercept.abs()
    hidden_error = 3 * steepness * z_error + _ELEMENTWISE * store * (largest + affine)

    intercept_bias = fit.slope * (0 if weights.b1 is None else weights.b1.double()) + fit.intercept
    folded_row = ((weights.w2.double() * fit.slope) @ w1).square().sum(1).sqrt()
    folded_bias = (weights.w2.double() @ intercept_bias).abs() + b2
    terms = (2 * largest + affine) @ w2.T + folded_row * size + folded_bias + b2
    return 2 * (hidden_error @ w2.T) + 2 * gamma_f * terms


def lipschitz(sigma: Activation, lo: Tensor, hi: Tensor) -> Tensor:
    """Maximum of |σ'(z)| over z in [lo, hi], per neuron, float64; infinite if unbounded."""
    lo, hi = lo.double(), hi.double()
    edges = torch.tensor(sigma.breakpoints, dtype=torch.float64, device=lo.device)
    # σ' may jump at a kink: look at both of its sides.
    infinity = torch.tensor(torch.inf, dtype=torch.float64, device=lo.device)
    sides = torch.cat([edges, torch.nextafter(edges, -infinity), torch.nextafter(edges, infinity)])
    inside = sides.expand(*lo.shape, -1).clamp(lo[..., None], hi[..., None])
    points = torch.cat([lo[..., None], inside, hi[..., None]], -1)
    return sigma.derivative(points).abs().amax(-1) * (1 + ROUNDING)
