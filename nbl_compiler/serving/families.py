"""Which models are served, and where a plan's sites lie in them."""

from __future__ import annotations

import re

from nbl_compiler.plans import Site

VLLM_MODULES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
}
"""Architecture in a model's ``config.json`` → module of ``vllm.model_executor.models``.

All of them name a layer's parts alike (``input_layernorm``, ``self_attn``, ``mlp`` with
``gate_proj``, ``up_proj`` and ``down_proj``), and hand attention what ``input_layernorm`` returns.
"""

SECTION = "nbl"
"""Key of this package's section in an exported ``config.json``."""

PLAN_FILE = "nbl/plan.safetensors"
"""The plan in an exported folder. Not in its root, where every safetensors file holds weights."""

_PREFIX = "NBL"
_PARTS = {"attention": "self_attn", "ffn": "mlp"}
_WEIGHT = re.compile(r"(?:.*\.)?layers\.(\d+)\.([^.]+)\.(.+)")


def served_name(architecture: str) -> str:
    """Return the architecture that an exported ``config.json`` names instead."""
    return _PREFIX + architecture


def layer_of(site: Site) -> int | None:
    """Return the index of a site's decoder layer, or None if its name does not tell it."""
    found = re.search(rf"(?:^|\.)layers\.(\d+)\.{_PARTS[site.kind]}$", site.name)
    return int(found[1]) if found else None


def place_of(weight: str) -> tuple[int, str, str] | None:
    """Split a weight's name into layer, part of the layer and the rest; None outside the layers.

    ``model.layers.3.mlp.up_proj.weight`` → ``(3, "mlp", "up_proj.weight")``
    """
    found = _WEIGHT.fullmatch(weight)
    return (int(found[1]), found[2], found[3]) if found else None
