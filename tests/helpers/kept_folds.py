"""An FFN as a few dense neurons plus one folded map, in plain tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nbl_compiler.solvers.folding import FFNWeights, dense_ffn


@dataclass(frozen=True)
class KeptFold:
    """y = FFN_K(x) + matrix x + bias.

    Args:
        kept: Indices of the kept neurons, ascending, [k] int64.
        weights: Their weights (no output bias), [k, d] and [o, k].
        matrix: [o, d] float64, or None if every neuron is kept.
        bias: [o] float64, the original output bias included.
    """

    kept: Tensor
    weights: FFNWeights
    matrix: Tensor | None
    bias: Tensor


def kept_fold_ffn(folded: KeptFold, x: Tensor) -> Tensor:
    """The rewritten FFN in the dtype of ``x``: [..., d] → [..., o]."""
    kept = dense_ffn(folded.weights, x)
    if folded.matrix is None:
        return kept + folded.bias.to(kept)
    return kept + torch.nn.functional.linear(x, folded.matrix.to(x), folded.bias.to(x))


def keep_and_fold(
    weights: FFNWeights,
    kept: Tensor,
    matrix: Tensor,
    bias: Tensor,
    kept_columns: Tensor | None = None,
) -> KeptFold:
    """Assemble the rewritten FFN; with every neuron kept it is the original one."""
    compact = weights.select(kept)
    if kept.numel() == weights.neurons:
        original = torch.zeros_like(bias) if weights.b2 is None else weights.b2
        return KeptFold(kept, compact, None, original.double())
    if kept_columns is not None:
        compact = replace(compact, w2=kept_columns.to(weights.w2))
    return KeptFold(kept, compact, matrix.double(), bias.double())
