"""CATS: small gates are zero, so the up and down projections of their neurons need not be read.

Lee et al. 2024, arXiv 2404.08763: σ(W_gate x) · 1[|σ(W_gate x)| > t], t a quantile of each layer
over calibration text. The published recipe without its fine-tuning, implemented here; for plain
FFNs, which the paper does not treat, the same on σ(W1 x). Quality by modules that threshold; the
speed needs the paper's kernels, so the benchmark gives the bytes that such kernels would read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from nbl_compiler.shared_copy import shared_copy
from peers.ffn_inputs import Batch, visit_ffns
from peers.ffn_modules import FFNModules, find_ffns
from peers.thresholds import Sparsify, magnitude_quantile


def cats(model: nn.Module, batches: Sequence[Batch], sparsity: float) -> nn.Module:
    """Return a copy whose FFNs use only the largest 1 − ``sparsity`` of their gates."""
    thresholds: dict[str, float] = {}

    def visit(ffn: FFNModules, x: Tensor) -> None:
        first = ffn.linear(ffn.rows[0])
        gates = ffn.holder.get_submodule(ffn.activation)(F.linear(x, first.weight, first.bias))
        thresholds[ffn.name] = magnitude_quantile(gates, sparsity)

    visit_ffns(model, batches, visit)
    sparse = shared_copy(model)
    for ffn in find_ffns(sparse):
        activation = ffn.holder.get_submodule(ffn.activation)
        gate = nn.Sequential(activation, Sparsify(thresholds[ffn.name]))
        ffn.replace(ffn.activation, gate)
    return sparse


def unread_parameters(model: nn.Module, sparsity: float) -> int:
    """Return how many weights a token would leave unread with the paper's kernels, on average."""
    every = find_ffns(model)
    gates = sum(ffn.linear(ffn.rows[0]).weight.numel() for ffn in every)
    return round(sparsity * (sum(ffn.parameters for ffn in every) - gates))
