"""A site's own value and output maps, read off the graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.tiny import config, text, tiny
from torch import Tensor, nn

from nbl_compiler.calibration import observe_model
from nbl_compiler.passes.own_weights import OwnWeights

TOLERANCE = 1e-5


def own(model: nn.Module, **options: Any) -> list[OwnWeights | None]:
    """Return what calibration reads off every attention site."""
    found = observe_model(
        model, [text(seed=seed) for seed in range(2)], config(taps=1, **options), progress=False
    )
    return [site.own for site in found.observation.sites.values()]


def weights(model: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """Return the first layer's V [n, d] and O [d_out, heads · size], by the modules' names."""
    if name == "gpt2":
        attention = model.transformer.h[0].attn
        return attention.c_attn.weight.T[-attention.embed_dim :], attention.c_proj.weight.T
    if name == "phi3":
        attention = model.model.layers[0].self_attn
        size = model.config.num_key_value_heads * attention.head_dim
        return attention.qkv_proj.weight[-size:], attention.o_proj.weight
    attention = model.model.layers[0].self_attn
    return attention.v_proj.weight, attention.o_proj.weight


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral", "qwen2", "gpt2", "phi3"])
def test_they_are_the_modules_weights(name: str, implementation: str) -> None:
    model = tiny(name)
    model.set_attn_implementation(implementation)
    found = own(model)[0]
    assert found is not None
    value, output = weights(model, name)
    torch.testing.assert_close(
        found.value.flatten(0, 1), value.double(), atol=TOLERANCE, rtol=TOLERANCE
    )
    torch.testing.assert_close(
        found.output.flatten(1), output.double(), atol=TOLERANCE, rtol=TOLERANCE
    )


def test_where_they_are_not_affine_there_are_none() -> None:
    """An encoder's map reads no states; MLA projects its values in two steps."""
    assert own(tiny("bert")) == [None, None]
    assert own(tiny("deepseek_v3")) == [None, None]
    assert own(tiny("llama"), input="residual") == [None, None]
