"""``guard_tokens``: guarded FFNs run dense where a graph holds more tokens than guards are for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.own_ffn import compiled_ffn, folded, own_model, rows
from torch import Tensor

import nbl_compiler as nbl
from nbl_compiler.errors import ConfigError
from nbl_compiler.graph_report import GraphReport

NAMES = ["layers.0", "layers.1"]


@pytest.fixture(scope="module")
def planned() -> tuple[Any, nbl.Plan]:
    """A guarded FFN and a static one."""
    model = own_model(True, True)
    guarded = folded(model, layers=(0,), keep=0.0, guard="predicted", capacity=0.2).sites[0]
    static = folded(model, layers=(1,), keep=0.25)
    nbl.attach(model, None)
    return model, nbl.Plan((guarded, static.sites[1]), static.fingerprint, static.model)


def outputs(planned: tuple[Any, nbl.Plan], x: Tensor, **options: Any) -> tuple[Tensor, list[str]]:
    """Return what the compiled model makes of ``x``, and the sites rewritten in its graph."""
    torch._dynamo.reset()
    model, plan = planned
    reports: list[GraphReport] = []
    with torch.no_grad():
        made = compiled_ffn(model, plan, report=reports.append, **options)(x)
    (report,) = reports
    return made, list(report.rewritten)


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 4), (4, 1), (2, 2)])
def test_few_tokens_are_guarded(planned, batch: int, length: int) -> None:
    x = rows(batch, length)
    made, sites = outputs(planned, x, guard_tokens=4)
    assert sites == NAMES
    assert torch.equal(made, outputs(planned, x)[0])


@pytest.mark.parametrize(("batch", "length"), [(1, 5), (5, 1), (2, 3)])
@pytest.mark.parametrize("dynamic", [None, True])
def test_more_tokens_run_the_dense_ffn(planned, batch: int, length: int, dynamic: Any) -> None:
    x = rows(batch, length)
    model, plan = planned
    made, sites = outputs(planned, x, guard_tokens=4, dynamic=dynamic, strict=True)
    assert sites == NAMES[1:]
    without = nbl.Plan((plan.sites[1],), plan.fingerprint, plan.model)
    assert torch.equal(made, outputs((model, without), x)[0])
    assert not torch.equal(made, outputs(planned, x)[0])


def test_the_reason_is_reported(planned) -> None:
    model, plan = planned
    reports: list[GraphReport] = []
    run = compiled_ffn(model, plan, report=reports.append, guard_tokens=4)
    with torch.no_grad():
        run(rows(2, 3))
    (left,) = reports[0].rejected
    assert left.site == NAMES[0]
    assert left.reason == "runs 6 tokens at once, more than guard_tokens=4"


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "8"])
def test_what_is_no_number_of_tokens(planned, value: object) -> None:
    with pytest.raises(ConfigError, match="must be a number of tokens, at least 1"):
        outputs(planned, rows(1, 2), guard_tokens=value)
