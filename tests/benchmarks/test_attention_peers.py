"""Attention dropping, NBL as published, and the statistics of the published way."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import texts, tiny
from models.architectures import inputs, make
from peers.attention_drop import drop, importances, static_cache, without_attention
from peers.does_not_apply import DoesNotApply
from peers.nbl_paper import observe, published
from peers.stored_statistics import stored_statistics
from transformers import StaticCache

import nbl_compiler as nbl
from nbl_compiler import speed
from nbl_compiler.calibration import observe_model
from nbl_compiler.evaluation.dropping import dropping
from nbl_compiler.kv_cache import cache_bytes
from nbl_compiler.shared_copy import shared_copy


def test_a_shared_copy_shares_parameters_and_nothing_else() -> None:
    model = tiny()
    twin = shared_copy(model)
    for mine, its in zip(model.parameters(), twin.parameters(), strict=True):
        assert mine is its
    twin.model.layers[0].mlp = torch.nn.Identity()
    assert not isinstance(model.model.layers[0].mlp, torch.nn.Identity)


def test_importance_is_one_minus_the_cosine_of_the_stream() -> None:
    model = tiny()
    ids = texts()[0]
    streams: list[torch.Tensor] = []
    layer = model.model.layers[0]
    layer.register_forward_pre_hook(lambda m, given: streams.append(given[0]))
    layer.post_attention_layernorm.register_forward_pre_hook(
        lambda m, given: streams.append(given[0])
    )
    found = importances(model, [ids])
    before, behind = streams[-2:]
    cosine = torch.nn.functional.cosine_similarity(before, behind, dim=-1).mean()
    torch.testing.assert_close(found[0], 1 - cosine)
    assert found.shape == (2,)


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2"])
def test_dropping_equals_maps_of_zero(name: str) -> None:
    model, given = make(name), inputs(name)
    batches = [inputs(name, 4, 64, seed=s)["input_ids"] for s in range(2)]
    config = nbl.Config(nbl.Attention(layers=(0, 2)))
    plan = dropping(nbl.calibrate(model, batches, config, progress=False))
    options = {"plan": plan, "lowering": "eager", "strict": True}
    fast = torch.compile(model, backend="nbl", options=options)
    with torch.no_grad():
        expected = fast(**given, use_cache=False).logits
        made = without_attention(model, [0, 2])(**given, use_cache=False).logits
        assert not torch.allclose(made, model(**given, use_cache=False).logits, atol=1e-3)
    torch.testing.assert_close(made, expected)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_dropped_layer_has_no_place_in_the_cache(name: str) -> None:
    model, ids = make(name), inputs(name, batch=1, length=10)["input_ids"]
    lighter = without_attention(model, [0])
    kv = static_cache(lighter, 16)
    speed.set_up(kv, lighter, 1)
    assert len(kv.layers) == 2
    full = StaticCache(config=model.config, max_cache_len=16)
    speed.set_up(full, model, 1)
    assert cache_bytes(kv) < cache_bytes(full)
    with torch.no_grad():
        whole = lighter(ids, use_cache=False).logits
        lighter(ids[:, :6], past_key_values=kv)
        steps = [lighter(ids[:, i : i + 1], past_key_values=kv).logits for i in range(6, 10)]
    torch.testing.assert_close(torch.cat(steps, 1), whole[:, 6:], rtol=1e-5, atol=1e-5)


def test_the_least_important_layers_go() -> None:
    model = make("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()  # this one does nothing
    light = drop(model, texts(), 1 / 3)
    given = inputs("llama")
    with torch.no_grad():
        torch.testing.assert_close(light(**given).logits, model(**given).logits)


def test_encoders_are_refused() -> None:
    with pytest.raises(DoesNotApply, match="no pre-norm decoder"):
        importances(make("bert"), [inputs("bert")["input_ids"]])


def test_the_papers_recipe() -> None:
    model = tiny()
    plan = published(observe(model, texts()), 1)
    (site,) = plan.rewritten
    assert site.details["input"] == "residual"
    assert site.details["ridge"] == 0.0
    bounds = {s.name: s.cca_bound for s in plan.sites}
    assert min(bounds, key=bounds.__getitem__) == site.name


def test_stored_statistics_are_those_of_the_streaming_moments() -> None:
    model, batches = tiny(), texts()
    stored = stored_statistics(model, batches)
    config = nbl.Config(nbl.Attention(count=1), holdout=0.0)
    sites = observe_model(model, batches, config, progress=False).observation.sites
    for layer, site in zip(stored, sites.values(), strict=True):
        moments = site.train.centred()
        tokens = site.train.count - 1
        # The stream adds float32 products of shifted blocks; 1e-5 of the largest entry is theirs.
        for mine, its in ((moments.xx, layer.xx), (moments.yx, layer.yx)):
            scale = float(its.abs().max())
            torch.testing.assert_close(mine / tokens, its, rtol=0, atol=1e-5 * scale)
        torch.testing.assert_close(site.train.mean_y, layer.mean_y, rtol=1e-5, atol=1e-6)
