"""``nbl.release``: memory goes, compiled graphs and retracing stay, everything else says so."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from models.architectures import make
from torch import Tensor, nn

import nbl_compiler as nbl
from nbl_compiler.errors import ConfigError, NBLError, WeightsReleasedError
from nbl_compiler.plans import Plan


def subject(guard: str = "off") -> tuple[nn.Module, Plan, Tensor]:
    """A tiny Llama with one linearized attention layer and two folded FFNs, calibrated once."""
    model, plan = deepcopy(_calibrated(guard)[0]), _calibrated(guard)[1]
    nbl.attach(model, plan)
    return model, plan, torch.randint(3, 64, (2, 9))


@cache
def _calibrated(guard: str) -> tuple[nn.Module, Plan]:
    model = make("llama", "sdpa", layers=2).eval()
    batches = [torch.randint(3, 64, (4, 32)) for _ in range(6)]
    ffn: Any = nbl.FFN(max_nmse=1e9, guard=guard)
    config = nbl.Config(attention=nbl.Attention(count=1), ffn=ffn)
    plan = nbl.calibrate(model, batches, config, progress=False)
    return model, plan


def compiled(model: nn.Module, plan: Plan, **more: Any) -> Callable[[Tensor], Tensor]:
    options = {"plan": plan, "lowering": "eager"}
    forward = torch.compile(model, backend="nbl", options=options, **more)

    def run(ids: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = forward(ids, use_cache=False).logits
        return logits

    return run


@pytest.mark.parametrize("guard", ["off", "predicted"])
def test_released_weights_are_no_longer_needed(guard: str) -> None:
    model, plan, ids = subject(guard)
    run = compiled(model, plan)
    before = run(ids)
    held = nbl.resident_bytes(model, plan)
    done = nbl.release(model, plan, ids, use_cache=False)
    assert len(done.parameters) == 4 + 2 * 3  # q, k, v, o; gate, up, down of both FFNs
    assert done.bytes > 0
    stand_ins = 4 * len(done.parameters)
    assert nbl.resident_bytes(model, plan) == held - done.bytes + stand_ins
    assert torch.equal(run(ids), before)
    again = compiled(model, plan, dynamic=True)(torch.cat([ids, ids]))
    torch.testing.assert_close(again[:2], before)


def test_without_example_inputs_the_models_own_are_used() -> None:
    model, plan, _ = subject()
    assert len(nbl.release(model).parameters) == 10
    assert nbl.release(model, plan).parameters == ()


def test_a_second_call_says_what_the_first_did() -> None:
    model, plan, ids = subject()
    first = nbl.release(model, plan, ids, use_cache=False)
    second = nbl.release(model, plan, ids, use_cache=False)
    assert second.bytes == 0
    assert second.earlier == first.parameters
    assert str(second) == "released 0 parameters, 0 bytes; 10 were released before"


def _run_dense(model: nn.Module, plan: Plan, ids: Tensor) -> None:
    model(ids)


def _calibrate(model: nn.Module, plan: Plan, ids: Tensor) -> None:
    nbl.calibrate(model, [ids], progress=False)


def _save(model: nn.Module, plan: Plan, ids: Tensor) -> None:
    model.state_dict()


def _compile_dense(model: nn.Module, plan: Plan, ids: Tensor) -> None:
    compiled(model, Plan())(ids)


def _compile_by_a_copy_of_the_plan(model: nn.Module, plan: Plan, ids: Tensor) -> None:
    compiled(model, Plan(plan.sites, plan.fingerprint))(ids)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (_run_dense, "running this model uncompiled needs"),
        (_calibrate, "calibration needs 10 weight"),
        (_save, "cannot be saved: nbl.release let go"),
        (_compile_dense, "a model without this plan needs 10"),
        (_compile_by_a_copy_of_the_plan, r"folding model\.layers\.0\.mlp by this plan needs 3"),
    ],
)
def test_everything_else_is_refused(use: Callable[..., None], message: str) -> None:
    model, plan, ids = subject()
    nbl.release(model, plan, ids, use_cache=False)
    with pytest.raises(WeightsReleasedError, match=message):
        use(model, plan, ids)


def test_nothing_to_release() -> None:
    with pytest.raises(ConfigError, match="nothing to release: the model has no plan"):
        nbl.release(make("llama", "sdpa", layers=1))


def test_a_plan_of_another_model_releases_nothing() -> None:
    _model, plan, ids = subject()
    other = make("llama", "sdpa", layers=2).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    with pytest.raises(NBLError, match="does not fit"):
        nbl.release(other, plan, ids)
    assert all(p.isfinite().all() for p in other.parameters())
