"""Certified error of a folded plain FFN whose out-of-range neurons are corrected exactly.

    |y − y_dense|_j  ≤  Σ_i |W2[j, i]| · e_i,    e_i = max on [lo_i, hi_i] of |σ(z) − a_i z − c_i|

for *every* input, because a neuron is either in its range, where e_i bounds its error, or
corrected. The bound is in exact arithmetic. With a predictor, its certificate
(``lowering.predictors``) narrows the range that is tested, so the bound stays.
"""

from __future__ import annotations

import torch
from torch import Tensor

_EPS = torch.finfo(torch.float64).eps


def folded_bound(w2: Tensor, max_error: Tensor) -> Tensor:
    """Largest possible |y − y_dense| of each output, [o] float64.

    Args:
        w2: [o, f].
        max_error: e, [f].
    """
    magnitude, error = w2.double().abs(), max_error.double()
    # A sum of n non-negative products is low by at most a factor (1 − n·eps).
    return (error @ magnitude.T) * (1 + (magnitude.shape[1] + 2) * _EPS)
