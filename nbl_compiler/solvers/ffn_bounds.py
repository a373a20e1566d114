"""Certified error of a folded plain FFN whose out-of-range neurons are corrected exactly.

    |y − y_dense|_j  ≤  Σ_i |W2[j, i]| · e_i,    e_i = max on [lo_i, hi_i] of |σ(z) − a_i z − c_i|

for *every* input, because a neuron is either in its range, where e_i bounds its error, or
corrected. The bound is in exact arithmetic; :func:`rounding_slack` adds what floating point can
contribute to either side. With a predictor ẑ = Ŵ1 x + b̂1 instead of z, Hölder's inequality gives
|ẑ_i − z_i| ≤ m_i(x) (:func:`prediction_margin`), and either the tested range is narrowed by m_i
(:func:`narrow_range`; the bound stays) or the certified range is widened
(:func:`widened_errors`; the test stays).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nbl_compiler.solvers.activation_errors import lipschitz, max_affine_error
from nbl_compiler.solvers.activations import activation
from nbl_compiler.solvers.affine_fit import AffineFit
from nbl_compiler.solvers.folding import FFNWeights

_EPS = torch.finfo(torch.float64).eps

_ELEMENTWISE = 16
"""Roundings charged to one evaluation of σ(z) − a·z − c with rounded a and c: three operations,
two rounded constants, and up to eight units in the last place for the library's σ."""


def folded_bound(w2: Tensor, max_error: Tensor, folded: Tensor | None = None) -> Tensor:
    """Largest possible |y − y_dense| of each output, [o] float64.

    Args:
        w2: [o, f].
        max_error: e, [f]; may carry batch dimensions in front, [..., f], and so will the bound.
        folded: Indices of the folded neurons, [n] int64; the others count as exact. All by
            default.
    """
    magnitude, error = w2.double().abs(), max_error.double()
    if folded is not None:
        magnitude, error = magnitude[:, folded], error[..., folded]
    # A sum of n non-negative products is low by at most a factor (1 − n·eps).
    return (error @ magnitude.T) * (1 + (magnitude.shape[1] + 2) * _EPS)


def prediction_margin(weights: FFNWeights, w1_hat: Tensor, x: Tensor) -> Tensor:
    """Upper bound on |ẑ_i − z_i| for a predictor ẑ = Ŵ1 x + b1: [..., f] float64.

    The least of three Hölder bounds ‖ΔW1_i‖_p ‖x‖_q, (p, q) = (2, 2), (1, ∞) and (∞, 1).

    Args:
        weights: The FFN.
        w1_hat: Ŵ1, what the predictor computes with (dequantized), [f, d].
        x: [..., d].
    """
    x = x.double()
    difference = (w1_hat.double() - weights.w1.double()).abs()
    norms = (
        (difference.square().sum(1).sqrt(), x.square().sum(-1).sqrt()),
        (difference.sum(1), x.abs().amax(-1)),
        (difference.amax(1), x.abs().sum(-1)),
    )
    margins = torch.stack([size[..., None] * row for row, size in norms])
    return margins.amin(0) * (1 + (difference.shape[1] + 4) * _EPS)


def narrow_range(fit: AffineFit, margin: Tensor) -> tuple[Tensor, Tensor]:
    """The range [lo + m, hi − m] in which ẑ certifies that z is in [lo, hi]; shapes of ``margin``.

    Where it is empty (lo > hi) the neuron must count as out of range, as the comparisons
    ``ẑ < lo`` or ``ẑ > hi`` make it.
    """
    infinity = torch.tensor(torch.inf, dtype=torch.float64, device=margin.device)
    return torch.nextafter(fit.lo + margin, infinity), torch.nextafter(fit.hi - margin, -infinity)


def widened_errors(weights: FFNWeights, fit: AffineFit, margin: Tensor) -> Tensor:
    """Maximum error on [lo − m, hi + m], where z lies if ẑ was found in [lo, hi].

    Args:
        weights: The FFN, for its activation.
        fit: The affine fits.
        margin: m, [..., f].

    Returns:
        [..., f] float64, to be given to :func:`folded_bound`.
    """
    infinity = torch.tensor(torch.inf, dtype=torch.float64, device=margin.device)
    lo = torch.nextafter(fit.lo - margin, -infinity)
    hi = torch.nextafter(fit.hi + margin, infinity)
    return max_affine_error(activation(weights.activation), lo, hi, fit.slope, fit.intercept)


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
