"""Single weights set to zero, by a score: what Wanda and RIA share.

The zeros have no pattern, so without kernels and hardware of their own nothing gets faster, nor
smaller: these peers are compared in quality alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from nbl_compiler.shared_copy import shared_copy
from peers.ffn_inputs import Batch, visit_ffns
from peers.ffn_modules import FFNModules

Score = Callable[[Tensor, Tensor], Tensor]
"""(weight [n, d], ‖x_j‖ of each input [d]) → scores [n, d]."""
Mask = Callable[[Tensor, float], Tensor]
"""(scores [n, d], share to prune) → what stays, bool [n, d]."""


def prune_ffns(
    model: nn.Module, batches: Sequence[Batch], sparsity: float, score: Score, mask: Mask
) -> nn.Module:
    """Return a copy with a share of all FFN weights at zero.

    Layer by layer, as both papers do: scores come from the dense layer on the stream that the
    pruned layers before it leave.

    Args:
        model: Dense.
        batches: Calibration text.
        sparsity: Share of the weights, in [0, 1).
        score: Of single weights.
        mask: What stays.
    """
    pruned = shared_copy(model)

    def visit(ffn: FFNModules, x: Tensor) -> None:
        norms = {path: x.norm(dim=0) for path in ffn.rows} | {ffn.down: ffn.hidden(x).norm(dim=0)}
        for path, norm in norms.items():
            linear = ffn.linear(path)
            weight = linear.weight.detach()
            stays = mask(score(weight.float(), norm.float()), sparsity)
            linear.weight = nn.Parameter(weight * stays, requires_grad=False)

    visit_ffns(pruned, batches, visit)
    return pruned


def best_of_rows(scores: Tensor, sparsity: float) -> Tensor:
    """Keep the same number of weights in every row, those with the largest scores."""
    gone = int(scores.shape[1] * sparsity)
    order = scores.argsort(dim=1, stable=True)
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, order[:, :gone], False)


def best_of_matrix(scores: Tensor, sparsity: float) -> Tensor:
    """Keep the largest scores of the whole matrix."""
    return best_of_rows(scores.reshape(1, -1), sparsity).view_as(scores)
