"""Constant folding of an FFN whose neurons are replaced by affine maps of its input.

    plain:  y = W2 σ(W1 x + b1) + b2          gated:  y = W2 (σ(W1 x + b1) ⊙ (W_up x + b_up)) + b2

With σ(z) ≈ a⊙z + c (TARDIS, arXiv 2501.10054, section 3) all neurons fold into C = W2 diag(a) W1,
B = W2 (a⊙b1 + c) + b2. With any affine map of x per neuron, z ≈ H x + h, they fold into W2 H and
W2 h + b2; that covers gated FFNs, and is never worse than the first on the calibration text.
Neurons that no affine map fits are kept: they stay a small dense FFN next to the folded matrix.
Everything is computed in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nbl_compiler.solvers.activations import activation
from nbl_compiler.solvers.affine_fit import AffineFit


@dataclass(frozen=True)
class FFNWeights:
    """Weights of a plain or gated FFN, in the ``y = x Wᵀ + b`` convention of ``nn.Linear``.

    Args:
        activation: One of :data:`nbl_compiler.solvers.activations.ACTIVATION_NAMES`.
        w1: [f, d]; of a gated FFN the gate projection.
        w2: [o, f].
        b1: [f] or None.
        b2: [o] or None.
        w_up: [f, d] of a gated FFN, None of a plain one.
        b_up: [f] or None.
    """

    activation: str
    w1: Tensor
    w2: Tensor
    b1: Tensor | None = None
    b2: Tensor | None = None
    w_up: Tensor | None = None
    b_up: Tensor | None = None

    @property
    def gated(self) -> bool:
        """Whether the activation is multiplied by an up projection."""
        return self.w_up is not None

    @property
    def neurons(self) -> int:
        """f, the number of hidden neurons."""
        return self.w1.shape[0]

    def select(self, neurons: Tensor) -> FFNWeights:
        """The FFN of these neurons alone ([k] int64), without the output bias."""

        def rows(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.index_select(0, neurons.to(tensor.device))

        return replace(
            self,
            w1=self.w1.index_select(0, neurons.to(self.w1.device)),
            w2=self.w2.index_select(1, neurons.to(self.w2.device)),
            b1=rows(self.b1),
            b2=None,
            w_up=rows(self.w_up),
            b_up=rows(self.b_up),
        )


def hidden_product(weights: FFNWeights, x: Tensor) -> Tensor:
    """What the down projection reads: [..., d] → [..., f]."""
    z = activation(weights.activation)(torch.nn.functional.linear(x, weights.w1, weights.b1))
    if weights.w_up is None:
        return z
    return z * torch.nn.functional.linear(x, weights.w_up, weights.b_up)


def dense_ffn(weights: FFNWeights, x: Tensor) -> Tensor:
    """The original FFN: [..., d] → [..., o]."""
    return torch.nn.functional.linear(hidden_product(weights, x), weights.w2, weights.b2)


def affine_hidden(weights: FFNWeights, fit: AffineFit) -> tuple[Tensor, Tensor]:
    """The per-neuron affine maps z ≈ H x + h that σ(z) ≈ a·z + c amounts to: ([f, d], [f]).

    Raises:
        ValueError: for a gated FFN, whose neurons are not functions of one pre-activation.
    """
    if weights.gated:
        raise ValueError("an affine activation folds plain FFNs only; fit gated neurons on x")
    slope = fit.slope.to(weights.w1.device)
    bias = fit.intercept.to(slope)
    if weights.b1 is not None:
        bias = bias + slope * weights.b1.double()
    return slope[:, None] * weights.w1.double(), bias


def fold_hidden(
    weights: FFNWeights, hidden_weight: Tensor, hidden_bias: Tensor, neurons: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Fold the affine maps z_i ≈ hidden_weight[i] x + hidden_bias[i] into one map of x.

    Args:
        weights: The FFN.
        hidden_weight: H, [f, d].
        hidden_bias: h, [f].
        neurons: The neurons to fold, [n] int64; all by default.

    Returns:
        (matrix [o, d], bias [o]) float64: W2 H and W2 h + b2.
    """
    w2, h, c = weights.w2.double(), hidden_weight.double(), hidden_bias.double()
    if neurons is not None:
        w2, h, c = w2[:, neurons], h[neurons], c[neurons]
    bias = w2 @ c
    return w2 @ h, bias if weights.b2 is None else bias + weights.b2.double()


def fold_affine(
    weights: FFNWeights, fit: AffineFit, neurons: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """TARDIS's fold of a plain FFN: C = W2 diag(a) W1 and B = W2 (a⊙b1 + c) + b2.

    Arguments, result and errors as :func:`fold_hidden` and :func:`affine_hidden`.
    """
    return fold_hidden(weights, *affine_hidden(weights, fit), neurons)


def neuron_scores(residual: Tensor, w2: Tensor) -> Tensor:
    """E[r_i²]·‖W2[:, i]‖²: the mean squared output error of folding neuron i alone, [f]."""
    return residual.double() * w2.double().square().sum(0).to(residual.device)


def kept_count(neurons: int, keep: float, multiple_of: int = 1) -> int:
    """How many neurons ``keep`` asks for, rounded up to a multiple (and to at most all).

    Args:
        neurons: f.
        keep: Fraction in [0, 1].
        multiple_of: Round up to this, for kernels that like full tiles.

    Raises:
        ValueError: if ``keep`` is outside [0, 1].
    """
    if not 0 <= keep <= 1:
        raise ValueError(f"keep={keep!r} must lie in [0, 1]")
    # A product like 0.07 · 100 = 7.000000000000001 must not round up to 8.
    wanted = math.ceil(keep * neurons - 1e-9 * neurons)
    return min(neurons, -(-wanted // multiple_of) * multiple_of)


def select_kept(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` neurons of highest score, and the others; both ascending int64."""
    order = scores.argsort(descending=True, stable=True)
    return order[:count].sort().values, order[count:].sort().values
