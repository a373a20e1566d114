"""RIA: relative importance and activations.

    RIA_ij = (|W_ij| / Σ_k |W_kj| + |W_ij| / Σ_k |W_ik|) · ‖X_j‖₂^a,  a = 1/2

Zhang et al. 2024 (ICLR, "Plug-and-Play: An Efficient Post-training Pruning Method for Large
Language Models"), the score of sections 3.1 and 3.2. The published recipe without channel
permutation (which serves N:M sparsity), implemented here, on the FFNs' matrices; weights are
compared across the matrix, as in the released code.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from peers.ffn_inputs import Batch
from peers.unstructured import best_of_matrix, prune_ffns

EXPONENT = 0.5
"""a: the paper's default."""


def score(weight: Tensor, norm: Tensor) -> Tensor:
    """Return RIA_ij, [n, d]."""
    size = weight.abs()
    relative = size / size.sum(0) + size / size.sum(1, keepdim=True)
    return relative.nan_to_num() * norm**EXPONENT  # a row or column of zeros has none


def ria(model: nn.Module, batches: Sequence[Batch], sparsity: float) -> nn.Module:
    """Return a copy with ``sparsity`` of the FFN weights at zero."""
    return prune_ffns(model, batches, sparsity, score, best_of_matrix)
