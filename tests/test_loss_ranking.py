"""``rank_by="loss"``."""

from __future__ import annotations

from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models.architectures import inputs, make
from torch import nn

import nbl_compiler as nbl
from nbl_compiler import held_back
from nbl_compiler.errors import ConfigError
from nbl_compiler.loss_ranking import best_alone, greedy_order, worst
from nbl_compiler.trial_text import (
    TRIAL_TOKENS,
    Part,
    repeated,
)
from nbl_compiler.trial_text import (
    recoded as recode_rows,
)
from nbl_compiler.written_text import written

# float32 forward passes of a tiny model, compared through a softmax
KL_ROUNDING = 1e-6


@given(st.lists(st.floats(0, 10), min_size=1, max_size=8), st.integers(0, 8))
def test_additive_disturbances_are_ordered_by_size(costs, depth):
    alone = {str(i): {0: cost} for i, cost in enumerate(costs)}
    order = greedy_order(alone, depth, lambda names, *_: {0: sum(alone[n][0] for n in names)})
    # Sums in another order are rounded: differences of sums, not of the costs themselves.
    assert [alone[n][0] for n in order] == pytest.approx(sorted(costs), abs=1e-12)


@given(st.lists(st.lists(st.floats(0, 10), min_size=1, max_size=3), min_size=1, max_size=9),
       st.integers(1, 9))  # fmt: skip
def test_the_best_alone_are_known_exactly(kinds, places):
    """A trial that ends at its first kind beyond the limit gives a bound, never for the best."""

    def disturbance(name, limit):
        tried = {}
        for kind, value in enumerate(kinds[int(name)]):
            tried[kind] = value
            if value > limit:
                break
        return tried

    found, bounds = best_alone([str(i) for i in range(len(kinds))], places, disturbance)
    alone = {name: worst(tried) for name, tried in found.items()}
    true = [max(of) for of in kinds]
    assert all(alone[name] == true[int(name)] for name in set(alone) - bounds)
    assert all(alone[name] <= true[int(name)] for name in bounds)
    assert sorted(alone.values())[:places] == sorted(true)[:places]
    exact = [alone[name] for name in set(alone) - bounds]
    assert all(alone[name] > sorted(exact)[places - 1] for name in bounds)


def test_greedy_avoids_a_pair_that_is_bad_together():
    alone = {"a": {0: 1.0}, "b": {0: 1.1}, "c": {0: 1.2}}
    together = {frozenset(p): {0: sum(alone[n][0] for n in p)} for p in combinations(alone, 2)}
    together[frozenset("ab")] = {0: 50.0}
    order = greedy_order(alone, 2, lambda names, *_: together[frozenset(names)])
    assert order == ["a", "c", "b"]


def test_what_a_site_adds_to_its_worst_kind_counts_whatever_the_others_added_to_theirs():
    """Kind 1 is worst because of a; c adds least to it, and most to kind 0."""
    alone = {"a": {0: 0.1, 1: 1.0}, "b": {0: 0.5, 1: 1.5}, "c": {0: 2.0, 1: 0.1}}

    def disturbance(names, before, limit):
        tried = {}
        for kind in (0, 1):
            tried[kind] = sum(alone[name][kind] for name in names)
            if tried[kind] - before[kind] > limit:
                break
        return tried

    assert greedy_order(alone, 3, disturbance) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("options", "tensor"),
    [
        ({}, "bias"),
        pytest.param({"taps": 2}, "averages", marks=pytest.mark.thorough),
        ({"mixed": True}, "gates"),
    ],
)
def test_the_loss_of_a_site_is_the_divergence_its_map_causes(options, tensor):
    model = make("llama")
    batches = [inputs("llama", 4, 64, seed=s)["input_ids"] for s in range(3)]
    config = nbl.Config(attention=nbl.Attention(count=1, rank_by="loss", **options))
    plan = nbl.calibrate(model, batches, config, progress=False)
    (site,) = plan.rewritten
    assert tensor in site.tensors
    assert len(site.tensors) == 2 or options
    fast = torch.compile(model, backend="nbl", options={"plan": plan, "lowering": "eager"})

    def divergence(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            dense, ours = (m(ids, use_cache=False).logits.log_softmax(-1) for m in (model, fast))
        return (dense.exp() * (dense - ours)).sum(-1)

    last = batches[-1]
    natural = divergence(last).mean().item()
    # Half of the rows; 32 tokens, then all of them but the opening one again, up to the length.
    again = torch.cat([last[:2, :33], last[:2, 1:32]], 1)
    twice = divergence(again)[:, 33:].mean().item()
    part = Part({"input_ids": last}, lambda count: torch.arange(count))
    recoded = divergence(recode_rows(model, part).inputs["input_ids"]).mean().item()
    own = divergence(*written(model, [last])).mean().item()
    expected = max(natural, twice, recoded, own)
    assert site.details["loss"] == pytest.approx(expected, abs=KL_ROUNDING)
    others = [s.details.get("loss", s.details.get("loss_at_least")) for s in plan.sites]
    assert site.details["loss"] == min(others)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60))
def test_what_trials_keep_from_the_fit(rows):
    """Batches of 64 tokens a row: enough for the trials, and a fifth of the text at most."""
    model, aside = make("llama", layers=1), []
    batches = [torch.ones(count, 64, dtype=torch.long) for count in rows]
    fitted = list(held_back.all_but_last(model, iter(batches), aside))
    kept = sum(batch["input_ids"].numel() for batch in aside)
    total = 64 * sum(rows)
    if len(rows) == 1:
        assert len(fitted) == len(aside) == 1
        return
    assert sum(map(torch.numel, fitted)) + kept == total
    assert aside
    last = batches[-1].numel()
    assert kept <= max(held_back.MOST_ASIDE * total, last)
    smallest = kept - aside[0]["input_ids"].numel()
    assert smallest < TRIAL_TOKENS  # no batch more than trials need
    room = held_back.MOST_ASIDE * total >= TRIAL_TOKENS + max(b.numel() for b in batches)
    assert kept >= TRIAL_TOKENS or not room


def test_without_logits_the_main_output_is_compared():
    model = make("bert")
    options = nbl.Attention(count=1, rank_by="loss")
    batches = [inputs("bert", 4, 32, seed=s)["input_ids"] for s in range(2)]
    plan = nbl.calibrate(model, batches, nbl.Config(attention=options), progress=False)
    (site,) = plan.rewritten
    fast = torch.compile(model, backend="nbl", options={"plan": plan, "lowering": "eager"})
    last = batches[-1]
    part = Part({"input_ids": last}, lambda count: torch.arange(count))
    kinds = [last, repeated(part).inputs["input_ids"], recode_rows(model, part).inputs["input_ids"]]

    def error(ids: torch.Tensor, first: int) -> float:
        with torch.no_grad():
            dense, ours = (m(ids).last_hidden_state[:, first:] for m in (model, fast))
        spread = (dense - dense.mean((0, 1))).square().sum()
        return float((dense - ours).square().sum() / spread)

    errors = [error(ids, first) for ids, first in zip(kinds, (0, 17, 0), strict=True)]
    assert site.details["loss"] == pytest.approx(max(errors), rel=1e-4)


class Wordless(nn.Module):
    """Returns something that holds a tensor where nobody would look."""

    def __init__(self) -> None:
        super().__init__()
        self.body = make("bert")

    def forward(self, input_ids: torch.Tensor) -> object:
        return SimpleNamespace(hidden=self.body(input_ids).last_hidden_state)


def test_a_model_that_returns_no_tensor_is_refused():
    options = nbl.Attention(count=1, rank_by="loss")
    batches = [inputs("bert", 4, 32, seed=s)["input_ids"] for s in range(2)]
    with pytest.raises(ConfigError, match='returned no tensor; use rank_by="nmse"'):
        nbl.calibrate(Wordless().eval(), batches, nbl.Config(attention=options), progress=False)


@pytest.mark.parametrize("choice", [{"layers": (0,)}, {"count": 2}, {"max_nmse": 2.0}])
def test_no_trials_where_nothing_is_left_to_choose(choice):
    model = make("llama", layers=2)
    batches = [inputs("llama", 4, 32, seed=s)["input_ids"] for s in range(3)]
    config = nbl.Config(attention=nbl.Attention(rank_by="loss", **choice))
    plan = nbl.calibrate(model, batches, config, progress=False)
    assert plan.rewritten
    assert all("loss" not in site.details for site in plan.sites)
