"""Tiny models saved as folders, and plans with random maps for them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch
import transformers as hf
from torch import Tensor

import nbl_compiler as nbl
from nbl_compiler.fingerprint import sketch
from nbl_compiler.plans import Plan, Site

# vLLM's attention on CPUs wants heads of at least 32.
WIDTH, HEAD, NEURONS, LAYERS, VOCABULARY, POSITIONS = 64, 32, 96, 4, 64, 128


def make_model(family: str, **changes: object) -> hf.PreTrainedModel:
    """Return a random model in eval mode, every weight of which matters.

    Args:
        family: The stem of transformers' class names, such as ``"Qwen2"`` or ``"Gemma3Text"``.
        **changes: Of its configuration.
    """
    options = {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": NEURONS,
        "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 2,
        "max_position_embeddings": POSITIONS, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 0, **changes,
    }  # fmt: skip
    if family.startswith(("Qwen3", "Gemma")):
        options["head_dim"] = HEAD
    if family == "Llama":
        options |= {"attention_bias": True, "mlp_bias": True}
    config = getattr(hf, f"{family}Config")(**options)
    # The fused attention of transformers leaves Gemma 2's soft cap out.
    config._attn_implementation = "eager" if family == "Gemma2" else "sdpa"
    model = getattr(hf, family.replace("Text", "") + "ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = 0.1 if weight.ndim == 1 else 2 / weight.shape[-1] ** 0.5
            weight.copy_(scale * torch.randn(weight.shape, generator=generator))
            if "norm" in name and not family.startswith("Gemma"):  # whose norms add the one
                weight.add_(1)
    return model


def random_plan(
    model: hf.PreTrainedModel,
    attention: Collection[int] = (),
    ffn: Mapping[int, int] | None = None,
    residual: Collection[int] = (),
    guarded: Collection[int] = (),
    seed: int = 3,
) -> Plan:
    """Return a plan that replaces some layers' attention and FFNs by seeded random maps.

    Args:
        model: The model that the plan is for.
        attention: Layers whose attention becomes a map.
        ffn: Layer → number of neurons kept of its folded FFN.
        residual: Those of ``attention`` whose map reads the residual stream.
        guarded: Layers whose FFN is folded with a guard, as calibration makes it.
        seed: Of the maps' entries.
    """
    generator = torch.Generator().manual_seed(seed)
    sketches = list(dict.fromkeys(map(sketch, model.parameters())))
    silu = model.config.model_type in ("llama", "mistral", "qwen2", "qwen3")

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    def site(layer: int, part: str) -> Site:
        name = f"model.layers.{layer}.{part}"
        kind = "attention" if part == "self_attn" else "ffn"
        if kind == "ffn" and layer in guarded:
            return with_guards.site(name)
        if layer not in (attention if kind == "attention" else ffn or {}):
            return Site(name, kind, "kept", "left dense by the test")
        block = model.get_submodule(name)
        details: dict = {"weights": [sketches.index(sketch(p)) for p in block.parameters()]}
        tensors = {"weight": random(WIDTH, WIDTH), "bias": random(WIDTH)}
        if kind == "attention":
            details["input"] = "residual" if layer in residual else "normed"
        else:
            kept = ffn[layer]
            details |= {
                "form": "keep+fold", "activation": "silu" if silu else "gelu_tanh", "gated": True,
                "neurons": NEURONS, "kept": kept, "width_in": WIDTH, "width_out": WIDTH,
            }  # fmt: skip
            if kept:
                order = torch.randperm(NEURONS, generator=generator)
                tensors |= {"kept": order[:kept].sort().values, "down": random(WIDTH, kept)}
            if kept == NEURONS:
                del tensors["weight"]
        reason = "asked for by the test"
        return Site(name, kind, "rewritten", reason, tensors=tensors, details=details)

    with_guards = _calibrated(model, guarded)
    parts = [(i, part) for i in range(LAYERS) for part in ("self_attn", "mlp")]
    return Plan(tuple(site(*part) for part in parts), tuple(sketches), type(model).__name__)


def _calibrated(model: hf.PreTrainedModel, guarded: Collection[int]) -> Plan:
    """Return a calibrated plan of FFNs with guards, weights numbered as in ``random_plan``."""
    if not guarded:
        return Plan()
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, VOCABULARY, (4, 64), generator=generator) for _ in range(3)]
    ffn = nbl.FFN(layers=sorted(guarded), keep=0.25, guard="predicted", capacity=0.1)
    plan = nbl.calibrate(model, texts, nbl.Config(attention=None, ffn=ffn), progress=False)
    order = list(dict.fromkeys(map(sketch, model.parameters())))

    def renumbered(site: Site) -> Site:
        weights = [order.index(plan.fingerprint[i]) for i in site.details.get("weights", ())]
        return replace(site, details={**site.details, "weights": weights})

    return Plan(tuple(map(renumbered, plan.sites)), tuple(order))


def prompts() -> list[list[int]]:
    """Return prompts of mixed lengths."""
    generator = torch.Generator().manual_seed(9)
    lengths = (5, 40, 17, 1, 33)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def save(model: hf.PreTrainedModel, folder: Path) -> Path:
    """Save a model as an ordinary folder."""
    model.save_pretrained(folder)
    return folder
