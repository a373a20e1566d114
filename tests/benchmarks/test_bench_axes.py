"""The axes of the benchmark on tiny models: what a row holds, and that it is counted right."""

from __future__ import annotations

import argparse

import pytest
import torch
from bench import footprint, growth, quality, speed_points
from bench.contenders import CONTENDERS, Made
from bench.profiles import PROFILES
from bench.random_plans import evenly, guarded_plan, random_plan
from bench.ratios import of_rounds
from bench.shapes import TINY, build
from bench.subjects import Subject, decoder
from helpers.rates import FixedRates
from helpers.tiny import tiny
from peers.magnitude import magnitude

import nbl_compiler as nbl
from nbl_compiler import speed
from nbl_compiler.value_states import States

RATES = FixedRates()
POINT = speed_points.Point("prefill", 16, batch=2, repeats=2)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return decoder("tiny", argparse.Namespace(tokens=512, eval_tokens=256))


def test_every_profile_names_known_contenders() -> None:
    for profile in PROFILES.values():
        parts = [*profile.embeddings, *(part for some in profile.quality.values() for part in some)]
        assert {name for names, _ in parts for name in names} <= set(CONTENDERS)
        assert speed_points.DENSE in profile.timed
        # Shapes have no text: whoever is timed must be able to do without.
        assert all(CONTENDERS[name].random is not None for name in profile.timed)


def test_the_dense_model_against_itself(subject: Subject) -> None:
    row = quality.measure(CONTENDERS["dense eager"], subject, 0.0)
    assert row["ratios"]["perplexity"]["value"] == 1.0
    assert row["perplexity"] == row["dense_perplexity"]
    assert row["kl"] == 0.0
    assert row["top1"] == 1.0
    assert row["weight_bytes_per_token"] == row["resident_bytes"] - 4 * buffers(subject.model)


def buffers(model: torch.nn.Module) -> int:
    return sum(buffer.numel() for buffer in model.buffers())


def test_quality_of_a_plan_and_of_a_changed_model(subject: Subject) -> None:
    made = {n: quality.measure(CONTENDERS[n], subject, 0.5) for n in ("NBL, published", "FLAP")}
    dense = footprint.weight_bytes_read(Made(subject.model))
    matrix = TINY["hidden_size"] * TINY["intermediate_size"]
    for row in made.values():
        assert row["kl"] > 0
        low, high = row["interval"]
        assert low <= row["ratios"]["perplexity"]["value"] <= high
    biases = 4 * TINY["num_hidden_layers"] * TINY["hidden_size"]
    gone = 4 * TINY["num_hidden_layers"] * 3 * matrix // 2
    assert made["FLAP"]["weight_bytes_per_token"] == dense - gone + biases
    assert made["NBL, published"]["weight_bytes_per_token"] < dense


def test_bytes_that_a_token_reads_and_a_model_holds() -> None:
    model = tiny()
    embedding = model.get_input_embeddings().weight
    every = footprint.storage_bytes([*model.parameters()])
    assert footprint.weight_bytes_read(Made(model)) == every - embedding.numel() * 4  # not tied
    halved = Made(magnitude(model, 0.5))
    saved = every - footprint.storage_bytes([*halved.model.parameters()])
    assert footprint.weight_bytes_read(halved) == every - embedding.numel() * 4 - saved
    assert saved == sum(p.numel() for n, p in model.named_parameters() if ".mlp." in n) * 2


def test_held_bytes_are_those_after_a_release() -> None:
    model = build("tiny-shape")
    plan = random_plan(model, 2, 1, 0.25)
    ids = torch.ones(1, 4, dtype=torch.long)
    held = footprint.held_bytes(Made(model, plan), input_ids=ids, use_cache=False)
    nbl.release(model, plan, input_ids=ids, use_cache=False)
    left = nbl.resident_bytes(model, plan)
    stand_ins = sum(4 for p in model.parameters() if p.untyped_storage().nbytes() == 4)
    assert held == left - stand_ins


def test_the_peak_of_a_call_is_what_it_held_at_once() -> None:
    def call() -> None:
        for _ in range(3):
            torch.ones(1000, dtype=torch.float64)  # freed before the next
        first = torch.ones(500, dtype=torch.float64)
        torch.ones(1000, dtype=torch.float64)
        del first

    assert footprint.peak_allocated(call) == 8 * 1500


def test_ratios_of_rounds() -> None:
    made = of_rounds([2.0, 4.0, 3.0], [1.0, 1.0, 2.0])
    assert (made["value"], made["low"], made["high"]) == (3.0, 1.5, 4.0)


def test_names_are_spread_evenly() -> None:
    names = [str(i) for i in range(8)]
    assert evenly(names, 2) == ["3", "7"]
    assert evenly(names, 8) == names
    assert evenly(names, 0) == []


def test_random_plans_run() -> None:
    model = build("tiny-shape")
    ids = torch.arange(1, 17)[None]
    plans = {
        "states": random_plan(model, 2, 0, 0.0, states=States(1, True)),
        "mixed": random_plan(model, 2, 0, 0.0, states=States(mixed=True)),
        "guarded": guarded_plan(model, 0.25),
    }
    for name, plan in plans.items():
        torch._dynamo.reset()
        options = {"plan": plan, "lowering": "eager", "strict": True}
        with torch.no_grad():
            made = torch.compile(model, backend="nbl", options=options)(ids, use_cache=False)
        assert made.logits.isfinite().all(), name
    assert len(plans["guarded"].rewritten) == TINY["num_hidden_layers"]
    first, second = (site.tensors["weight"] for site in plans["guarded"].rewritten[:2])
    assert first.data_ptr() != second.data_ptr()


def test_a_point_of_speed() -> None:
    subject = Subject("shape", build("tiny-shape", layers=2))
    names = ("dense eager", speed_points.DENSE, "attention dropped", "keep+fold", "int8")
    with speed.measuring():
        rows = speed_points.measure(POINT, subject, [CONTENDERS[n] for n in names], RATES)
    assert list(rows) == [POINT.name("shape", CONTENDERS[name]) for name in names]
    eager, dense, dropped, folded, quantized = rows.values()
    assert {name for name, *_ in subject.checked} >= set(names[1:4])
    assert "torchao" in quantized.get("skipped", "torchao")
    assert dense["ratios"]["speed-up"]["value"] == 1.0
    assert dense["predicted_speedup"] == 1.0
    assert eager["compile_seconds"] >= 0
    assert eager["predicted_seconds"] == dense["predicted_seconds"]
    assert dropped["flops_per_token"] < dense["flops_per_token"]
    assert dropped["ratios"]["resident bytes"]["value"] < 1
    assert dropped["predicted_speedup"] > 1
    for row in (eager, dense, dropped, folded):
        assert len(row["seconds"]) == POINT.repeats
        assert row["tokens_per_second"] == pytest.approx(32 / row["median_seconds"])
        assert row["peak_bytes"] > row["resident_bytes"]


def test_a_point_that_does_not_fit_into_memory_says_so() -> None:
    subject = Subject("shape", build("tiny-shape", layers=2))
    point = speed_points.Point("decode", 2**40)
    (row,) = speed_points.measure(point, subject, [CONTENDERS["dense inductor"]], RATES).values()
    assert "caches would take" in row["skipped"]


def test_what_computes_something_else_is_not_timed() -> None:
    wrong, right = torch.zeros(2, 3), torch.ones(2, 3)
    with pytest.raises(speed_points.WrongResult, match=r"compiled logits differ by 1\.00e"):
        speed_points._check(CONTENDERS["NBL"], wrong, right)
    speed_points._check(CONTENDERS["NBL"], right, right)


@pytest.mark.thorough
def test_calibrations_growth() -> None:
    """One batch against four: what the published way holds grows with the tokens."""
    one, two = (
        growth.calibration(growth.Calibration(128, tokens, rounds=1)) for tokens in (2048, 8192)
    )
    assert (one["tokens"], two["tokens"]) == (2048, 8192)
    assert two["bytes"]["moments"] == one["bytes"]["moments"]
    assert two["bytes"]["here"] < 1.3 * one["bytes"]["here"]
    assert two["bytes"]["published"] > 2 * one["bytes"]["published"]


def test_guards_always_replace_more() -> None:
    assert POINT.fraction_of(CONTENDERS["guarded"]) == 0.8
    assert POINT.fraction_of(CONTENDERS["NBL"]) == POINT.fraction
    assert POINT.name("shape", CONTENDERS["guarded"]).endswith("at 0.5/guarded 0.8")
