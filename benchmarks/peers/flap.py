"""FLAP: neurons that fluctuate least go, and their means stay behind as a bias.

    S_j = Var[X_j] · ‖W_:j‖²,  standardised per layer and compared across layers,
    b ← b + Σ_{j gone} W_:j E[X_j]

An et al. 2023, arXiv 2312.11983: fluctuation metric (WIFV), adaptive structure across layers,
bias compensation. The published recipe, implemented here, for the neurons of FFNs (the paper also
prunes heads). Statistics are those of the dense model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nbl_compiler.shared_copy import shared_copy
from peers.ffn_inputs import Batch, visit_ffns
from peers.ffn_modules import FFNModules, find_ffns
from peers.structured import keep_neurons


def flap(model: nn.Module, batches: Sequence[Batch], sparsity: float) -> nn.Module:
    """Return a copy without ``sparsity`` of all FFN neurons; every FFN keeps at least one."""
    means: dict[str, Tensor] = {}
    scores: dict[str, Tensor] = {}

    def visit(ffn: FFNModules, x: Tensor) -> None:
        hidden = ffn.hidden(x).float()
        column = ffn.linear(ffn.down).weight.detach().float().square().sum(0)
        means[ffn.name] = hidden.mean(0)
        scores[ffn.name] = hidden.var(0) * column

    visit_ffns(model, batches, visit)
    standard = {name: (s - s.mean()) / s.std() for name, s in scores.items()}
    every = torch.cat(list(standard.values()))
    gone = round(every.numel() * sparsity)
    threshold = every.sort().values[gone] if gone < every.numel() else every.max()
    pruned = shared_copy(model)
    for ffn in find_ffns(pruned):
        own = standard[ffn.name]
        stays = own >= threshold
        stays[own.argmax()] = True
        lost = ffn.linear(ffn.down).weight.detach().float()[:, ~stays] @ means[ffn.name][~stays]
        keep_neurons(ffn, stays.nonzero().view(-1), lost)
    return pruned
