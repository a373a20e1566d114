"""What a monitor says about the traffic, and what it knows from the plan."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch._dynamo
from helpers.guard_subjects import Subject, exact, fresh, predicted
from helpers.monitoring import quiet, run, subject, traffic
from helpers.own_ffn import compiled_ffn, rows
from helpers.tiny import calibrated, compiled, output, text, texts, tiny
from torch import Tensor

import nbl_compiler as nbl
from nbl_compiler.errors import NBLWarning
from nbl_compiler.monitoring import watch
from nbl_compiler.monitoring.statistics import LEAST_SCALE, input_statistics


def test_the_same_traffic_fits() -> None:
    model, plan = subject()
    fast = compiled_ffn(model, plan)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NBLWarning)
        with nbl.monitor(fast) as m:
            run(fast, *traffic())
    assert m.fits is True
    assert m.verdict == "the plan fits the traffic"
    assert [row.state for row in m.report()] == ["fits", "fits"]


SHIFTED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "moved": (lambda x: x + 2.0, r"layers\.0: shift \d\.\d\d exceeds 0\.\d\d"),
    "wider": (lambda x: 2.0 * (x - 0.2) + 0.2, r"layers\.0: energy [34]\.\d\d exceeds 2\.00"),
    "narrower": (lambda x: 0.4 * (x - 0.2) + 0.2, r"layers\.0: energy 0\.\d\d is below 0\.50"),
    "not a number": (lambda x: x * float("nan"), r"layers\.0: inputs were NaN or infinite"),
}


@pytest.mark.parametrize("how", SHIFTED)
def test_other_traffic_does_not_and_the_next_window_forgets_it(how: str) -> None:
    change, message = SHIFTED[how]
    model, plan = subject()
    fast = compiled_ffn(model, plan)
    m = nbl.monitor(fast)
    ending = r".*\); calibrate on such text: nbl\.calibrate\(model, batches\)"
    message = rf"fits the traffic at \d of 2 sites \({message}{ending}"
    with pytest.warns(NBLWarning, match=message), m:
        run(fast, *map(change, traffic()))
    assert m.fits is False
    assert m.report()[0].state == "drifted"
    with m:
        run(fast, *traffic())
    assert m.fits is True


def test_another_distribution_of_tokens_does_not_fit() -> None:
    """Text of a single word, at a model that was calibrated on all of them."""
    model = tiny()
    plan = calibrated(model, layers=(0,))
    fast = compiled(model)
    ids = text(batch=16, seed=21)
    with quiet(fast) as usual:
        output(fast, ids)
    with quiet(fast) as other:
        output(fast, torch.full_like(ids, 7))
    assert (usual.fits, other.fits) == (True, False)
    assert [row.site for row in other.report()] == [plan.rewritten[0].name]


def test_a_full_guard_does_not_fit() -> None:
    one = fresh(exact("true"))
    fast = compiled_ffn(one.model, one.plan)
    limits = nbl.MonitorLimits(shift=100, energy=100, dense_share=0.05, tokens=50)
    message = r"layers\.0: \d+\.\d% of the tokens run dense, \d+\.\d% when calibrated"
    with pytest.warns(NBLWarning, match=message), nbl.monitor(fast, limits=limits) as m:
        run(fast, *[1.8 * x for x in traffic()])
    assert m.report()[0].state == "overflows"
    with quiet(fast, limits=replace(limits, dense_share=1.0)) as m:
        run(fast, *[1.8 * x for x in traffic()])
    assert m.fits is True


def test_few_tokens_decide_nothing() -> None:
    model, plan = subject()
    fast = compiled_ffn(model, plan)
    with nbl.monitor(fast, limits=nbl.MonitorLimits(tokens=61)) as m:
        run(fast, rows(3, 20) + 5)
    assert m.fits is None
    assert m.verdict == "undecided: 60 tokens seen, 61 are needed"
    assert [row.reason for row in m.report()] == ["fewer than 61 tokens"] * 2


def test_room_for_sampling_noise() -> None:
    limits = nbl.MonitorLimits(shift=0.5)
    assert limits.shift_for(10**9, float("inf")) == pytest.approx(0.5, rel=1e-6)
    assert limits.shift_for(256, float("inf")) == pytest.approx(0.5**0.5)
    assert limits.shift_for(256, 256) == pytest.approx(0.75**0.5)


def test_nothing_ran() -> None:
    model, plan = subject()
    fast = compiled_ffn(model, plan)
    message = r"saw no token: no compiled graph of this model ran"
    with pytest.warns(NBLWarning, match=message), nbl.monitor(fast) as m:
        run(model, rows())
    assert [(row.tokens, row.state) for row in m.report()] == [(0, "undecided")] * 2


def test_an_error_inside_is_not_talked_over() -> None:
    model, plan = subject()
    fast = compiled_ffn(model, plan)

    def fail(m: nbl.Monitor) -> None:
        with m:
            run(fast, *[x + 9 for x in traffic()])
            raise KeyError

    m = nbl.monitor(fast)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NBLWarning)
        with pytest.raises(KeyError):
            fail(m)
    assert m.fits is False
    assert watch._subjects == []


def test_the_table() -> None:
    one = fresh(exact("true"))
    fast = compiled_ffn(one.model, one.plan)
    with quiet(fast) as m:
        run(fast, *[x + 3 for x in traffic()])
        inside = str(m)
    for shown in (inside, str(m)):
        assert "the plan no longer fits the traffic at 2 of 2 sites" in shown
        assert "layers.0" in shown
        assert "564" in shown
        assert "drifted" in shown
        assert f"{m.report()[0].shift:.3f}" in shown
        assert f"{m.report()[1].dense_share:.1%}" in shown


def test_statistics_are_stored_and_come_back(tmp_path: Path) -> None:
    model = tiny()
    config = nbl.Config(attention=nbl.Attention(count=1), ffn=nbl.FFN(count=1))
    plan = nbl.calibrate(model, texts(), config, progress=False)
    plan.save(tmp_path / "plan")
    loaded = nbl.Plan.load(tmp_path / "plan")
    for site, other in zip(plan.sites, loaded.sites, strict=True):
        assert bool(site.inputs) == (site.decision == "rewritten")
        assert site.inputs.keys() == other.inputs.keys()
        assert site.tensors.keys() == other.tensors.keys()
        assert not site.inputs.keys() & site.tensors.keys()
        for key, tensor in site.inputs.items():
            assert torch.equal(tensor, other.inputs[key])
            assert tensor.shape == (site.details["width_in"],)
            assert tensor.dtype == torch.float32


def test_statistics_by_hand() -> None:
    variance = torch.tensor([4.0, 1.0, 0.0, -1e-12, 9.0], dtype=torch.float64)
    made = input_statistics(torch.arange(5.0), variance)
    floor = LEAST_SCALE * 2.0
    assert made["input_scale"].tolist() == pytest.approx([2.0, 1.0, floor, floor, 3.0])
    assert made["input_mean"].tolist() == [0, 1, 2, 3, 4]
    assert input_statistics(torch.ones(2), torch.zeros(2))["input_scale"].tolist() == [1, 1]


def without_statistics(plan: nbl.Plan) -> nbl.Plan:
    """Return the plan as an earlier release wrote it."""
    return nbl.Plan(tuple(replace(site, inputs={}) for site in plan.sites), plan.fingerprint)


def test_an_older_plan_counts_but_knows_no_drift(tmp_path: Path) -> None:
    old = without_statistics(exact("true").plan)
    old.save(tmp_path / "plan")
    one = Subject(exact("true").model, nbl.Plan.load(tmp_path / "plan"), gated=False)
    fast = compiled_ffn(one.model, one.plan)
    some = [rows(4, 80, seed=4)]
    with nbl.monitor(fast) as m:
        run(fast, *some)
    assert m.fits is None
    assert "drift is not known at 2 of 2 sites" in m.verdict
    assert "calibrate again" in m.verdict
    for row in m.report():
        assert (row.tokens, row.outliers) == (320, one.count(some)[row.site].outliers)
        assert row.state == "unknown"
        assert row.shift != row.shift
    with quiet(fast) as m:
        run(fast, *[3 * x for x in some])
    assert m.report()[0].state == "overflows"


def test_predicted_guards_flag_every_neuron_and_overflow_never() -> None:
    one = fresh(predicted("4 bits", True))
    fast = compiled_ffn(one.model, one.plan)
    with quiet(fast) as m:
        run(fast, *traffic())
    assert all(row.outliers > row.tokens and row.dense_tokens == 0 for row in m.report())
