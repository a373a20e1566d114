"""Whom a monitor watches: models, plans, several at once; and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from helpers.guard_subjects import calls, exact, fresh
from helpers.monitoring import TOLERANCE, by_hand, compilations, quiet, run, subject, traffic
from helpers.own_ffn import WIDTH, OwnModel, compiled_ffn, folded, own_model, rows
from torch import nn

import nbl_compiler as nbl
from nbl_compiler.errors import ConfigError
from nbl_compiler.monitoring import watch


def test_two_models_at_once() -> None:
    models = [own_model(True, True), own_model(True, True, seed=1)]
    plans = [folded(model, keep=0.25) for model in models]
    fast = [compiled_ffn(model, plan) for model, plan in zip(models, plans, strict=True)]
    with quiet(fast[0]) as first:
        run(fast[0], rows(1, 3))
        with compilations() as count, quiet(fast[1]) as second:
            run(fast[1], rows(1, 5))
            run(fast[0], rows(1, 3))
        assert count == [1]  # the first model's code does not care
        run(fast[1], rows(1, 5))
        run(fast[0], rows(1, 3))
    assert [row.tokens for row in first.report()] == [9, 9]
    assert [row.tokens for row in second.report()] == [5, 5]


def test_two_models_with_one_plan() -> None:
    one = fresh(exact("true"))
    models = [one.model, copy.deepcopy(one.model)]
    fast = [compiled_ffn(model, one.plan) for model in models]
    some = calls(5)
    with quiet(fast[0]) as own, quiet(one.plan) as both:
        run(fast[0], *some)
        run(fast[1], *some, *some)
    once, thrice = one.count(some), one.count(some * 3)
    for row, whole in zip(own.report(), both.report(), strict=True):
        assert (row.tokens, row.outliers) == (once[row.site].tokens, once[row.site].outliers)
        assert (whole.tokens, whole.outliers) == (
            thrice[row.site].tokens,
            thrice[row.site].outliers,
        )
    assert nbl.guard_counts(one.plan) == thrice


def test_one_model_with_two_plans() -> None:
    model, plan = subject()
    other = nbl.Plan(plan.sites, plan.fingerprint)
    fast = [compiled_ffn(model, p) for p in (plan, other)]
    with quiet(fast[0]) as first, quiet(model, plan=other) as second, quiet(other) as third:
        run(fast[0], rows(1, 3))
        run(fast[1], rows(1, 5))
    tokens = [[row.tokens for row in m.report()] for m in (first, second, third)]
    assert tokens == [[3, 3], [5, 5], [5, 5]]


def test_a_monitor_inside_a_monitor() -> None:
    model, plan = subject()
    fast = compiled_ffn(model, plan)
    with quiet(fast) as outer:
        run(fast, rows(1, 3))
        with quiet(fast) as inner:
            run(fast, rows(1, 4) + 1)
        run(fast, rows(1, 5))
    assert {row.tokens for row in outer.report()} == {12}
    assert {row.tokens for row in inner.report()} == {4}
    expected = by_hand(model, plan, [rows(1, 4) + 1])
    for row, (shift, energy) in zip(inner.report(), expected, strict=True):
        assert (row.shift, row.energy) == pytest.approx((shift, energy), rel=TOLERANCE)


def test_reset_begins_a_new_window() -> None:
    model, plan = subject()
    fast = compiled_ffn(model, plan)
    with quiet(fast) as m:
        run(fast, *[x + 9 for x in traffic()])
        m.reset()
        assert {row.tokens for row in m.report()} == {0}
        run(fast, *traffic())
    assert m.fits is True


WAYS: dict[str, Callable[[OwnModel, nbl.Plan], tuple[Callable[..., Any], object]]] = {}


def way(function: Callable[[OwnModel, nbl.Plan], tuple[Any, Any]]) -> Any:
    WAYS[function.__name__] = function
    return function


@way
def the_compiled_model(model: OwnModel, plan: nbl.Plan) -> tuple[Any, Any]:
    fast = compiled_ffn(model, plan)
    return fast, fast


@way
def the_model(model: OwnModel, plan: nbl.Plan) -> tuple[Any, Any]:
    nbl.attach(model, plan)
    return compiled_ffn(model), model


@way
def with_an_attached_plan(model: OwnModel, plan: nbl.Plan) -> tuple[Any, Any]:
    nbl.attach(model, plan)
    fast = compiled_ffn(model)
    return fast, fast


@way
def its_forward_replaced(model: OwnModel, plan: nbl.Plan) -> tuple[Any, Any]:
    options = {"plan": plan, "lowering": "eager"}
    model.forward = torch.compile(model.forward, backend="nbl", options=options)
    return model, model


@way
def its_compiled_forward(model: OwnModel, plan: nbl.Plan) -> tuple[Any, Any]:
    options = {"plan": plan, "lowering": "eager"}
    fast = torch.compile(model.forward, backend="nbl", options=options)
    return fast, fast


@way
def compiled_in_place(model: OwnModel, plan: nbl.Plan) -> tuple[Any, Any]:
    model.compile(backend="nbl", options={"plan": plan, "lowering": "eager"})
    return model, model


@way
def a_function(model: OwnModel, plan: nbl.Plan) -> tuple[Any, Any]:
    options = {"plan": plan, "lowering": "eager"}
    return torch.compile(lambda x: model(x) + 1, backend="nbl", options=options), plan


@way
def a_part_of_what_is_compiled(model: OwnModel, plan: nbl.Plan) -> tuple[Any, Any]:
    nbl.attach(model, plan)
    return compiled_ffn(nn.Sequential(model, nn.Linear(WIDTH, WIDTH)).eval()), model


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("before", [False, True], ids=["compiled inside", "compiled before"])
def test_what_may_be_monitored(name: str, before: bool) -> None:
    plain, plan = subject()
    model = copy.deepcopy(plain)
    fast, given = WAYS[name](model, plan)
    if before:
        run(fast, rows(1, 9))
    with quiet(given) as m:
        run(fast, rows(1, 7))
    run(fast, rows(1, 9))
    assert [(row.site, row.tokens) for row in m.report()] == [("layers.0", 7), ("layers.1", 7)]


def test_a_plan_by_its_path(tmp_path: Path) -> None:
    model, plan = subject()
    plan.save(tmp_path / "plan")
    fast = compiled_ffn(model, plan=tmp_path / "plan")
    with quiet(fast) as m:
        run(fast, rows(1, 7))
    assert [row.tokens for row in m.report()] == [7, 7]


# Bad input.


def test_not_compiled() -> None:
    with pytest.raises(ConfigError, match=r"monitor takes what torch\.compile\(.*, not 3"):
        nbl.monitor(3)
    with pytest.raises(ConfigError, match=r"monitor takes what torch\.compile"):
        nbl.monitor(torch.sin)


def test_no_plan() -> None:
    model = own_model(True)
    for given in (model, compiled_ffn(model)):
        with pytest.raises(ConfigError, match=r"OwnModel runs no plan: calibrate one with nbl\."):
            nbl.monitor(given)


def test_another_backend() -> None:
    model, plan = subject()
    nbl.attach(model, plan)
    message = r"compiled with backend='eager', which runs no plan; compile it with backend=\"nbl\""
    with pytest.raises(ConfigError, match=message):
        nbl.monitor(torch.compile(model, backend="eager"))
    with pytest.raises(ConfigError, match=r"backend='inductor'"):
        nbl.monitor(torch.compile(model))
    nbl.attach(model, None)


def test_a_plan_that_rewrites_nothing() -> None:
    model, plan = subject()
    kept = nbl.Plan(tuple(replace(s, decision="kept") for s in plan.sites), plan.fingerprint)
    for given in (kept, compiled_ffn(model, kept)):
        with pytest.raises(ConfigError, match="the plan rewrites no site"):
            nbl.monitor(given)


def test_two_plans_and_unknown_functions() -> None:
    _, plan = subject()
    with pytest.raises(ConfigError, match="given two plans"):
        nbl.monitor(plan, plan=subject()[1])
    with pytest.raises(ConfigError, match=r"cannot tell which model .* or plan=\.\.\. as well"):
        nbl.monitor(torch.compile(lambda x: x, backend="nbl"))


def test_entering_twice() -> None:
    _, plan = subject()
    with quiet(plan) as m, pytest.raises(ConfigError, match="running already; make another"):
        m.__enter__()
    assert watch._subjects == []


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"shift": 0}, r"shift=0\) must be positive"),
        ({"energy": 1}, r"energy=1\) must be above 1"),
        ({"dense_share": 0}, r"dense_share=0\) must be in \(0, 1\]"),
        ({"tokens": 0}, r"tokens=0\) must be at least 1"),
        ({"shift": float("nan")}, r"shift=nan\) must be positive"),
    ],
)
def test_bad_limits(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        nbl.MonitorLimits(**limits)
