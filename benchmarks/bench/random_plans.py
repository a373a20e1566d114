"""Plans with random tensors: for speed, which does not depend on the values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nbl_compiler.calibration import observe_model
from nbl_compiler.config import FFN, Config
from nbl_compiler.fingerprint import sketch
from nbl_compiler.plans import Plan, Site
from nbl_compiler.shared_copy import shared_copy
from nbl_compiler.value_states import BUCKETS, NO_STATES, States

_TEXT = (4, 128)
"""Random tokens that a guard is fitted on: enough for shapes."""


def random_plan(
    model: nn.Module, count: int, ffn: int, keep: float, *, states: States = NO_STATES
) -> Plan:
    """Return a plan that linearizes attention layers and folds FFNs, with random maps.

    Args:
        model: A decoder laid out as Llama.
        count: Attention layers to linearize, evenly spread.
        ffn: FFNs to fold, likewise.
        keep: Share of the neurons that stay dense in these.
        states: What the maps also read of the values.
    """
    sites = []
    for kind, suffix, wanted in (("attention", "self_attn", count), ("ffn", "mlp", ffn)):
        names = [name for name, _ in model.named_modules() if name.endswith(suffix)]
        chosen = set(evenly(names, wanted))
        for name in names:
            block = model.get_submodule(name)
            made = attention_map(model, states) if kind == "attention" else folded(block, keep)
            tensors, details = made
            details["parameters"] = sum(p.numel() for p in block.parameters())
            decision = "rewritten" if name in chosen else "kept"
            used = tensors if name in chosen else {}
            sites.append(Site(name, kind, decision, "random", tensors=used, details=details))
    return _plan(model, sites)


def guarded_plan(model: nn.Module, capacity: float, **options: Any) -> Plan:
    """Return a plan that folds every FFN behind a guard.

    One layer is fitted on a few random tokens, and every layer gets a copy of its tensors.

    Args:
        model: A decoder laid out as Llama.
        capacity: Share of the neurons put right on each token.
        **options: Further ones of ``nbl.FFN``.
    """
    single = shared_copy(model)
    single.model.layers = single.model.layers[:1]
    single.config.num_hidden_layers = 1
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, _TEXT, generator=generator)
    form = FFN(layers=(0,), keep=0.0, guard="predicted", capacity=capacity, **options)
    (site,) = observe_model(single, [ids], Config(None, form), progress=False).plan().rewritten
    details = {k: v for k, v in site.details.items() if k != "weights"}  # every layer's are others
    names = [name for name, _ in model.named_modules() if name.endswith("mlp")]
    return _plan(
        model,
        [replace(site, name=n, details=details, tensors=_cloned(site), inputs={}) for n in names],
    )


def evenly(names: list[str], wanted: int) -> list[str]:
    """Return ``wanted`` of the names, evenly spread."""
    step = max(len(names) // max(wanted, 1), 1)
    return names[step - 1 :: step][:wanted]


def attention_map(model: nn.Module, states: States) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a random linear map of the model's width, and what a site says of it."""
    config = model.config
    width = config.hidden_size
    tensors = {"weight": torch.randn(width, width) * 0.02, "bias": torch.zeros(width)}
    if not states:
        return tensors, {"input": "normed"}
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    values, heads = config.num_key_value_heads * head, config.num_attention_heads
    if states.taps:
        tensors["taps"] = torch.randn(states.taps, width, values) * 0.02
    if states.averages:
        tensors["averages"] = torch.randn(2, width, values) * 0.02
    if states.mixed:
        tensors["mix"] = torch.randn(width, heads * head) * 0.02
        tensors["gates"] = torch.randn(heads, 1 + len(BUCKETS), width) * 0.02
        tensors["gate_offsets"] = torch.zeros(heads, 1 + len(BUCKETS))
    return tensors, {"input": "normed", **vars(states)}


def folded(block: nn.Module, keep: float) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a folded FFN: the first neurons kept, a random map for the others."""
    neurons, width = block.up_proj.weight.shape
    k = round(keep * neurons)
    tensors = {
        "kept": torch.arange(k),
        "down": block.down_proj.weight[:, :k].detach().float().clone(),
        "weight": torch.randn(width, width) * 0.02,
        "bias": torch.zeros(width),
    }
    read = 3 * k * width + width * width + width
    details = {
        "form": "keep+fold", "activation": "silu", "gated": True, "neurons": neurons, "kept": k,
        "width_in": width, "width_out": width, "parameters_read": read,
    }  # fmt: skip
    return tensors, details


def _cloned(site: Site) -> dict[str, Tensor]:
    """Return copies: layers that shared tensors would find them in a cache."""
    return {name: tensor.clone() for name, tensor in site.tensors.items()}


def _plan(model: nn.Module, sites: list[Site]) -> Plan:
    fingerprint = tuple(dict.fromkeys(sketch(p) for p in model.parameters()))
    return Plan(tuple(sites), fingerprint, "random weights")
