"""Wanda: weights with the smallest |W_ij| · ‖X_j‖ go, the same number from every row.

Sun et al. 2023, arXiv 2306.11695, equation 1, section 3 (comparison group: one output). The
published recipe, implemented here, on the FFNs' matrices.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from peers.ffn_inputs import Batch
from peers.unstructured import best_of_rows, prune_ffns


def score(weight: Tensor, norm: Tensor) -> Tensor:
    """Return |W_ij| · ‖X_j‖₂, [n, d]."""
    return weight.abs() * norm


def wanda(model: nn.Module, batches: Sequence[Batch], sparsity: float) -> nn.Module:
    """Return a copy with ``sparsity`` of the FFN weights at zero."""
    return prune_ffns(model, batches, sparsity, score, best_of_rows)
