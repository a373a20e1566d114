"""Calibrating a model whose layers a device map left in memory and on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.saved_model import save_tiny_llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import nbl_compiler as nbl
from nbl_compiler.device_map import traceable
from nbl_compiler.errors import ConfigError

LAYERS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("spread"))


def load(folder: Path, **options: Any) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def load_spread(folder: Path) -> nn.Module:
    """Load the model with half of its layers, its embedding and its head on disk."""
    places: dict[str, str] = dict.fromkeys(["model.norm", "model.rotary_emb"], "cpu")
    places |= dict.fromkeys(["model.embed_tokens", "lm_head"], "disk")
    places |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(LAYERS)}
    return load(folder, device_map=places, offload_folder=folder / "offloaded")


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, 250, (4, 64), generator=generator) for _ in range(6)]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(batches()[0], use_cache=False).logits


def test_the_plan_is_that_of_the_model_in_one_place(folder: Path) -> None:
    spread, whole = load_spread(folder), load(folder)
    assert any(parameter.is_meta for parameter in spread.parameters())
    config = nbl.Config(nbl.Attention(count=2, rank_by="loss"), nbl.FFN(count=2, keep=0.5))
    plans = [nbl.calibrate(m, batches(), config, progress=False) for m in (spread, whole)]
    assert len(plans[0].rewritten) == 4
    assert plans[0].digest == plans[1].digest  # the same sums in the same order
    nbl.attach(whole, plans[0])


def test_the_model_is_left_as_it_was(folder: Path) -> None:
    spread = load_spread(folder)
    before, meta = logits(spread), [p.is_meta for p in spread.parameters()]
    forwards = [module.__dict__.get("forward") for module in spread.modules()]
    with traceable(spread):
        assert not any(p.is_meta for p in spread.parameters())
        torch.testing.assert_close(logits(spread), before, rtol=0, atol=0)
    assert [p.is_meta for p in spread.parameters()] == meta
    assert [module.__dict__.get("forward") for module in spread.modules()] == forwards
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in spread.modules())
    torch.testing.assert_close(logits(spread), before, rtol=0, atol=0)


def test_a_hook_of_another_kind_is_refused(folder: Path) -> None:
    from accelerate.hooks import LayerwiseCastingHook, add_hook_to_module

    model = load(folder)
    hook = LayerwiseCastingHook(torch.float32, torch.float32, non_blocking=False)
    add_hook_to_module(model.model.layers[1].mlp, hook)
    message = r"model.layers.1.mlp has a hook that calibration cannot follow \(LayerwiseCasting"
    with pytest.raises(ConfigError, match=message):
        nbl.calibrate(model, batches(), progress=False)
