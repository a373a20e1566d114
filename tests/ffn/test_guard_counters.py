"""Counters of guards against counts by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.guard_subjects import (
    EXACT,
    FOLDED,
    Subject,
    calls,
    exact,
    fresh,
    predicted,
)
from helpers.own_ffn import compiled_ffn, folded, own_model, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import nbl_compiler as nbl
from nbl_compiler import GuardCounts
from nbl_compiler.errors import (
    ConfigError,
)

NOTHING = GuardCounts(0, 0, 0, 0)


@pytest.mark.parametrize("form", EXACT)
def test_counts_are_those_by_hand_and_can_be_reset(form: str) -> None:
    one = fresh(exact(form))
    run = one.compile(dynamic=True)
    assert nbl.guard_counts(one.plan) == {}
    done: list[Tensor] = []
    for x in calls(5):
        run(x)
        done.append(x)
        assert nbl.guard_counts(one.plan) == one.count(done)
    for counts in nbl.guard_counts(one.plan).values():
        assert counts.tokens == 3 * 17 + 1 + 0 + 40
        assert 0 < counts.dense_tokens < counts.tokens
        assert counts.tokens < counts.outliers < FOLDED * counts.tokens
    nbl.reset_guard_counts(one.plan)
    assert nbl.guard_counts(one.plan) == dict.fromkeys(one.names, NOTHING)
    for x in (later := calls(6)):
        run(x)
    assert nbl.guard_counts(one.plan) == one.count(later)


@pytest.mark.parametrize(("form", "gated"), [("true", False), ("4 bits", True)])
def test_a_predicted_guard_looks_at_every_neuron_and_never_runs_dense(
    form: str, gated: bool
) -> None:
    one = fresh(predicted(form, gated))
    run = one.compile(dynamic=True)
    for x in calls(5):
        run(x)
    tokens = sum(x[..., 0].numel() for x in calls(5))
    expected = GuardCounts(tokens, FOLDED * tokens, FOLDED, 0)
    assert nbl.guard_counts(one.plan) == dict.fromkeys(one.names, expected)
    assert one.count(calls(5)) == nbl.guard_counts(one.plan)


@pytest.mark.parametrize("make", [lambda: exact("true"), lambda: predicted("4 bits", True)])
def test_tokens_that_are_not_finite_run_dense(make: Callable[[], Subject]) -> None:
    one = fresh(make())
    run, x = one.compile(), 0.1 * rows(2, 5, seed=5)
    run(x)
    before = nbl.guard_counts(one.plan)
    x[1, 3, 2] = float("inf")
    run(x)
    after = nbl.guard_counts(one.plan)
    for name in one.names:
        assert after[name].dense_tokens == 2 * before[name].dense_tokens + 1


def test_inductor_counts_the_same() -> None:
    one = fresh(exact("true", layers=1))
    run = one.compile(lowering="inductor")
    some = [1.5 * rows(1, 8, seed=seed) for seed in range(4)]
    for x in some:
        run(x)
    counts = nbl.guard_counts(one.plan)
    assert counts == one.count(some)
    assert 0 < counts["layers.0"].dense_tokens < counts["layers.0"].tokens
    nbl.reset_guard_counts(one.plan)
    run(some[0])
    assert nbl.guard_counts(one.plan) == one.count(some[:1])


@settings(max_examples=12)
@given(st.lists(st.sampled_from(["reset", *range(6)]), max_size=8))
def test_counts_are_those_since_the_last_reset(steps: list[str | int]) -> None:
    one = exact("true", layers=1)
    run = one.compile(dynamic=True)
    run(rows(2, 3))
    nbl.reset_guard_counts(one.plan)
    since: list[Tensor] = []
    for step in steps:
        if step == "reset":
            nbl.reset_guard_counts(one.plan)
            since.clear()
        else:
            assert isinstance(step, int)
            since.append(rows(1, 2 + step, seed=step))
            run(since[-1])
    assert nbl.guard_counts(one.plan) == one.count(since)


def test_the_models_of_a_plan_count_together() -> None:
    """Prefill and decode graphs, copies of the model, and a copy in another dtype."""
    one = fresh(exact("4 bits"))
    models = [one.model, copy.deepcopy(one.model), copy.deepcopy(one.model).double()]
    some = calls(5)[:2]
    for model in models:
        run = torch.no_grad()(compiled_ffn(model, one.plan))
        for x in some:
            run(x.to(model.layers[0].up.weight.dtype))
    counted, once = nbl.guard_counts(one.plan), one.count(some)
    assert counted == {name: counts + counts + counts for name, counts in once.items()}


def test_a_plan_from_a_file_counts_for_itself(tmp_path: Path) -> None:
    one = fresh(exact("true"))
    one.compile()(rows(2, 3))
    one.plan.save(tmp_path / "plan.safetensors")
    loaded = nbl.Plan.load(tmp_path / "plan.safetensors")
    assert nbl.guard_counts(loaded) == {}
    Subject(one.model, loaded, False).compile()(rows(1, 5))
    assert [counts.tokens for counts in nbl.guard_counts(loaded).values()] == [5, 5]
    assert [counts.tokens for counts in nbl.guard_counts(one.plan).values()] == [6, 6]


@pytest.mark.parametrize("modes", [(torch.inference_mode, torch.no_grad), (torch.no_grad,) * 2])
def test_counters_outlive_the_mode_they_were_made_in(modes: tuple[Any, Any]) -> None:
    one = fresh(exact("true", layers=1))
    run = compiled_ffn(one.model, one.plan)
    for mode in (*modes, *reversed(modes)):
        with mode():
            run(rows(1, 4))
        nbl.reset_guard_counts(one.plan)
        with mode():
            run(rows(1, 7))
            assert nbl.guard_counts(one.plan)["layers.0"].tokens == 7


def test_the_devices_of_a_plan_count_together() -> None:
    """Two names of one device stand for two."""
    one = fresh(exact("true", layers=1))
    one.compile()(rows(1, 4))
    before = nbl.guard_counts(one.plan)["layers.0"]
    other = one.plan.counters("layers.0", torch.device("cpu", 0))
    other.copy_(torch.tensor([2, 50, 17, 1]))
    counted = nbl.guard_counts(one.plan)["layers.0"]
    assert counted == GuardCounts(6, before.outliers + 50, 17, before.dense_tokens + 1)
    nbl.reset_guard_counts(one.plan)
    assert nbl.guard_counts(one.plan) == {"layers.0": NOTHING}


def test_means_and_sums() -> None:
    counts = GuardCounts(tokens=8, outliers=20, most_outliers=6, dense_tokens=2)
    assert (counts.outliers_per_token, counts.dense_share) == (2.5, 0.25)
    assert counts + GuardCounts(2, 9, 5, 1) == GuardCounts(10, 29, 6, 3)
    assert counts + NOTHING == counts
    assert (NOTHING.outliers_per_token, NOTHING.dense_share) == (0.0, 0.0)


UNGUARDED: dict[str, dict[str, Any]] = {
    "keep+fold": {"keep": 0.25},
    "kept whole": {"keep": 1.0, "guard": "exact"},
    "left dense": {"count": 0, "guard": "predicted"},
}


@pytest.mark.parametrize("form", UNGUARDED)
def test_plans_without_a_guard(form: str) -> None:
    model = own_model(False)
    plan = folded(model, **UNGUARDED[form])
    torch.no_grad()(compiled_ffn(model, plan))(rows(2, 3))
    nbl.reset_guard_counts(plan)
    assert nbl.guard_counts(plan) == {}
    with pytest.raises(ConfigError, match=r"no guarded FFN; calibrate with FFN\(guard="):
        nbl.guard_recall(model, plan, rows(2, 3))
