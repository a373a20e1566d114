"""Attention dropping: layers whose attention changes the residual stream's direction least go.

    importance = 1 − E[cos(h, h + attention(norm(h)))]

He et al. 2024, arXiv 2406.15786 (LLM-Drop), "attention drop" in one shot. The published recipe,
implemented here: the modules are really gone (norm, attention and, where the block has one, the
norm behind it), the others keep their order in a smaller KV cache.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbl_compiler.shared_copy import shared_copy
from peers.does_not_apply import DoesNotApply
from peers.ffn_inputs import Batch, one_batch


class NoAttention(nn.Module):
    """In place of dropped attention: adds nothing to the residual stream."""

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        """Return zeros of the input's shape [B, T, d], and no weights."""
        return torch.zeros_like(hidden_states), None


def importances(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """Return 1 − mean cosine of the stream before and after each layer's attention, [layers]."""
    layers = decoder_layers(model)
    before: list[Tensor] = [torch.empty(0)] * len(layers)
    made = torch.zeros(len(layers))
    inputs, real = one_batch(batches)
    hooks = []
    for i, layer in enumerate(layers):

        def entering(module: nn.Module, given: tuple[Any, ...], i: int = i) -> None:
            before[i] = given[0]

        def behind(module: nn.Module, given: tuple[Any, ...], i: int = i) -> None:
            cosine = F.cosine_similarity(before[i].float(), given[0].float(), dim=-1)
            made[i] = 1 - cosine.flatten()[real].mean()
            before[i] = torch.empty(0)

        hooks.append(layer.register_forward_pre_hook(entering))
        hooks.append(_norm_behind(layer).register_forward_pre_hook(behind))
    try:
        with torch.no_grad():
            getattr(model, "base_model", model)(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return made


def without_attention(model: nn.Module, dropped: Sequence[int]) -> nn.Module:
    """Return a copy without the attention of some layers; the others are numbered anew."""
    lighter = shared_copy(model)
    number = 0
    for i, layer in enumerate(decoder_layers(lighter)):
        if i not in dropped:
            layer.self_attn.layer_idx = number  # its place in the smaller cache
            number += 1
            continue
        layer.self_attn = NoAttention()
        layer.input_layernorm = nn.Identity()
        if hasattr(layer, "pre_feedforward_layernorm"):  # else it belongs to the FFN
            layer.post_attention_layernorm = nn.Identity()
    return lighter


def drop(model: nn.Module, batches: Sequence[Batch], fraction: float) -> nn.Module:
    """Return a copy without the attention of the ``fraction`` of least important layers."""
    scores = importances(model, batches)
    count = round(fraction * len(scores))
    return without_attention(model, scores.argsort(stable=True)[:count].tolist())


def static_cache(model: nn.Module, length: int) -> Any:
    """Return a static KV cache for the layers that still have attention."""
    from transformers import StaticCache

    stays = [not isinstance(layer.self_attn, NoAttention) for layer in decoder_layers(model)]
    config = copy.deepcopy(model.config.get_text_config())
    config.num_hidden_layers = sum(stays)
    if getattr(config, "layer_types", None):
        pairs = zip(config.layer_types, stays, strict=True)
        config.layer_types = [kind for kind, keep in pairs if keep]
    return StaticCache(config=config, max_cache_len=length)


def decoder_layers(model: nn.Module) -> list[Any]:
    """Return the blocks of a pre-norm decoder.

    Raises:
        DoesNotApply: if the model has none.
    """
    layers = [m for m in model.modules() if hasattr(m, "self_attn") and hasattr(m, "mlp")]
    if not layers or not all(hasattr(layer, "input_layernorm") for layer in layers):
        raise DoesNotApply(
            f"{type(model).__name__} is no pre-norm decoder: attention cannot be left out of its "
            "residual stream by this recipe"
        )
    return layers


def _norm_behind(layer: Any) -> nn.Module:
    """Return the norm that reads the stream behind attention."""
    name = "pre_feedforward_layernorm"
    behind = getattr(layer, name if hasattr(layer, name) else "post_attention_layernorm")
    assert isinstance(behind, nn.Module)
    return behind
