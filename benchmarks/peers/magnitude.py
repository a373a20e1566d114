"""Neurons with the smallest weights go: the baseline of structured pruning.

A neuron's score is the squared norm of all its weights, its rows of the projections and its column
of the down projection; the same share goes from every layer. Implemented here.
"""

from __future__ import annotations

from torch import Tensor, nn

from nbl_compiler.shared_copy import shared_copy
from peers.ffn_modules import FFNModules, find_ffns
from peers.structured import keep_neurons


def magnitude(model: nn.Module, sparsity: float) -> nn.Module:
    """Return a copy without ``sparsity`` of every FFN's neurons; needs no text."""
    pruned = shared_copy(model)
    for ffn in find_ffns(pruned):
        count = max(ffn.neurons - round(ffn.neurons * sparsity), 1)
        keep_neurons(ffn, scores(ffn).topk(count).indices.sort().values)
    return pruned


def scores(ffn: FFNModules) -> Tensor:
    """Return the squared norm of each neuron's weights, [f]."""
    rows = sum(ffn.linear(path).weight.detach().float().square().sum(1) for path in ffn.rows)
    return rows + ffn.linear(ffn.down).weight.detach().float().square().sum(0)
