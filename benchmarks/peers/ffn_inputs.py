"""What FFNs read: one run of the model over all calibration text, with a visit before each FFN.

A visit may change the FFN that is about to run. So recipes that go layer by layer, each on the
stream that the pruned ones before it leave, cost one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peers.ffn_modules import FFNModules, find_ffns

Batch = Tensor | Mapping[str, Tensor]


def visit_ffns(
    model: nn.Module, batches: Sequence[Batch], visit: Callable[[FFNModules, Tensor], None]
) -> None:
    """Call ``visit(ffn, x)`` right before each FFN runs on x [tokens, d], padding left out.

    Args:
        model: A transformers model.
        batches: Token ids [B, T], or mappings with ``attention_mask``.
        visit: May replace parameters of the FFN.
    """
    inputs, real = one_batch(batches)
    hooks = []
    for ffn in find_ffns(model):

        def before(module: nn.Module, given: tuple[Any, ...], ffn: FFNModules = ffn) -> None:
            visit(ffn, given[0].flatten(0, -2)[real])

        hooks.append(ffn.linear(ffn.rows[0]).register_forward_pre_hook(before))
    try:
        with torch.no_grad():
            getattr(model, "base_model", model)(**inputs)  # without the head
    finally:
        for hook in hooks:
            hook.remove()


def one_batch(batches: Sequence[Batch]) -> tuple[dict[str, Tensor], Tensor]:
    """Return all batches as one, and which of its B · T tokens are real, bool."""
    if isinstance(batches[0], Tensor):
        ids = torch.cat([_ids(batch) for batch in batches])
        return {"input_ids": ids}, torch.ones(ids.numel(), dtype=torch.bool)
    given = [dict(batch) for batch in batches]
    length = max(batch["input_ids"].shape[1] for batch in given)
    joined = {
        key: torch.cat([F.pad(b[key], (0, length - b[key].shape[1])) for b in given])
        for key in given[0]
    }
    return joined, joined["attention_mask"].flatten().bool()


def _ids(batch: Batch) -> Tensor:
    assert isinstance(batch, Tensor)
    return batch
