"""``rank_by="loss"``."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models.architectures import inputs, make

import nbl_compiler as nbl
from nbl_compiler.errors import ConfigError
from nbl_compiler.loss_ranking import greedy_order

# float32 forward passes of a tiny model, compared through a softmax
KL_ROUNDING = 1e-6


@given(st.lists(st.floats(0, 10), min_size=1, max_size=8), st.integers(0, 8))
def test_additive_disturbances_are_ordered_by_size(costs, depth):
    alone = {str(i): cost for i, cost in enumerate(costs)}
    order = greedy_order(alone, depth, lambda names: sum(alone[n] for n in names))
    assert sorted(alone.values()) == [alone[name] for name in order]


def test_greedy_avoids_a_pair_that_is_bad_together():
    alone = {"a": 1.0, "b": 1.1, "c": 1.2}
    together = {frozenset(p): sum(alone[n] for n in p) for p in combinations(alone, 2)}
    together[frozenset("ab")] = 50.0
    order = greedy_order(alone, 2, lambda names: together[frozenset(names)])
    assert order == ["a", "c", "b"]


def test_the_loss_of_a_site_is_the_divergence_its_map_causes():
    model = make("llama")
    batches = [inputs("llama", 4, 64, seed=s)["input_ids"] for s in range(3)]
    config = nbl.Config(attention=nbl.Attention(count=1, rank_by="loss"))
    plan = nbl.calibrate(model, batches, config, progress=False)
    (site,) = plan.rewritten
    fast = torch.compile(model, backend="nbl", options={"plan": plan, "lowering": "eager"})
    with torch.no_grad():
        keep = torch.arange(64)
        dense = model(batches[-1], use_cache=False, logits_to_keep=keep).logits.log_softmax(-1)
        ours = fast(batches[-1], use_cache=False, logits_to_keep=keep).logits.log_softmax(-1)
    expected = (dense.exp() * (dense - ours)).sum(-1).mean().item()
    assert site.details["loss"] == pytest.approx(expected, abs=KL_ROUNDING)
    assert site.details["loss"] == min(s.details["loss"] for s in plan.sites)


def test_a_model_without_logits_is_refused():
    model = make("bert")
    config = nbl.Config(attention=nbl.Attention(count=1, rank_by="loss"))
    batches = [inputs("bert", 4, 32, seed=s)["input_ids"] for s in range(2)]
    with pytest.raises(ConfigError, match='use rank_by="nmse"'):
        nbl.calibrate(model, batches, config, progress=False)
