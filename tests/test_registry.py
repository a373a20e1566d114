"""Which plan belongs to which model, and when compiled code must be made again."""

from __future__ import annotations

import copy
import gc
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import helpers.tiny
import pytest
import torch
import torch._dynamo
from helpers.plans import random_plan
from helpers.surgery import linearize_by_surgery
from helpers.tiny import calibrated, compiled, output, text
from models.architectures import BY_NAME, HIDDEN
from torch import Tensor, nn

import nbl_compiler as nbl
from nbl_compiler import plan_file, registry
from nbl_compiler.errors import PlanMismatchError
from nbl_compiler.fingerprint import sketch

# Float32 rounding of a tiny model with logits of order 1–10; plans differ by far more.
TOLERANCE = 1e-4


def tiny(name: str = "llama", seed: int = 0) -> nn.Module:
    return helpers.tiny.tiny(name, seed, layers=1)


def plan_for(model: nn.Module, seed: int = 3, name: str = "llama") -> nbl.Plan:
    """A plan with a seeded random map for the only site: quick, and easily told apart."""
    return random_plan(model, BY_NAME[name].site_names(1), [0], HIDDEN, seed=seed)


def mapped(model: nn.Module, plan: nbl.Plan | None) -> Tensor:
    """What the model says when it runs the plan, by surgery instead of compilation."""
    return output(model if plan is None else linearize_by_surgery(model, plan), text())


def same(value: Tensor, expected: Tensor) -> bool:
    return torch.allclose(value, expected, rtol=0, atol=TOLERANCE)


@contextmanager
def compilations() -> Iterator[list[int]]:
    """Count the graphs that Dynamo compiles."""
    counts: list[int] = [0]
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    yield counts
    counts[0] = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before


no_plan = pytest.mark.filterwarnings("ignore:backend=:nbl_compiler.errors.NBLWarning")


def test_calibrate_attaches_its_plan() -> None:
    model = tiny()
    plan = calibrated(model)
    assert registry.find_plan(model.parameters()) is plan
    assert same(output(compiled(model), text()), mapped(model, plan))
    assert not same(mapped(model, plan), mapped(model, None))


@no_plan
def test_a_model_compiled_before_finds_the_plan_at_its_next_call() -> None:
    model = tiny()
    fast = compiled(model)
    assert same(output(fast, text()), mapped(model, None))
    plans = [plan_for(model, seed) for seed in (1, 2)]
    for plan in (*plans, None, plans[0]):
        nbl.attach(model, plan)
        with compilations() as count:
            for _ in range(2):
                result = output(fast, text())
        assert count == [1]
        assert same(result, mapped(model, plan))


@no_plan
def test_attaching_what_is_attached_costs_nothing() -> None:
    model, other = tiny(), tiny("gpt2")
    plan = plan_for(model)
    nbl.attach(model, plan)
    fast = compiled(model)
    output(fast, text())
    with compilations() as count:
        nbl.attach(model, plan)
        nbl.attach(other, plan_for(other, name="gpt2"))
        nbl.attach(other, None)
        output(fast, text())
    assert count == [0]


@no_plan
def test_plans_may_change_more_often_than_dynamo_recompiles() -> None:
    """A sweep over plans must not end in eager code because old entries fill Dynamo's cache."""
    model = tiny()
    fast = compiled(model)
    for seed in range(4):
        nbl.attach(model, plan := plan_for(model, seed))
        with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
            assert same(output(fast, text()), mapped(model, plan))


@no_plan
@pytest.mark.parametrize("first", ["with plan", "without plan"])
def test_two_models_of_one_class_do_not_share_compiled_code(first: str) -> None:
    """Dynamo passes weights as inputs: without a guard, one model would run the other's maps."""
    models = [tiny(seed=1), tiny(seed=2)]
    plan = plan_for(models[0])
    nbl.attach(models[0], plan)
    expected = [mapped(models[0], plan), mapped(models[1], None)]
    turns = [0, 1, 0, 1] if first == "with plan" else [1, 0, 1, 0]
    fast = [compiled(model) for model in models]
    with compilations() as count:
        for turn in turns:
            assert same(output(fast[turn], text()), expected[turn])
    assert count == [2]


def test_two_models_with_plans_of_their_own() -> None:
    models = [tiny(seed=1), tiny(seed=2)]
    plans = [plan_for(model, seed) for seed, model in enumerate(models)]
    expected = [mapped(*pair) for pair in zip(models, plans, strict=True)]
    for model, plan in zip(models, plans, strict=True):
        nbl.attach(model, plan)
    fast = [compiled(model) for model in models]
    for turn in (0, 1, 1, 0):
        assert same(output(fast[turn], text()), expected[turn])


def test_one_model_compiled_with_two_plans() -> None:
    model = tiny()
    plans = [plan_for(model, seed) for seed in (1, 2)]
    expected = [mapped(model, plan) for plan in plans]
    fast = [compiled(model, plan=plan) for plan in plans]
    with compilations() as count:
        for turn in (0, 1, 1, 0):
            assert same(output(fast[turn], text()), expected[turn])
    assert count == [2]


def test_a_plan_given_as_option_comes_before_the_attached_one() -> None:
    model = tiny()
    own, attached = plan_for(model, 1), plan_for(model, 2)
    nbl.attach(model, attached)
    assert same(output(compiled(model, plan=own), text()), mapped(model, own))
    assert same(output(compiled(model), text()), mapped(model, attached))


@no_plan
def test_a_deep_copy_is_dense_until_the_plan_is_attached_to_it() -> None:
    model = tiny()
    nbl.attach(model, plan := plan_for(model))
    fast = compiled(model)
    expected = output(fast, text())
    twin = copy.deepcopy(model)
    fast_twin = compiled(twin)
    assert same(output(fast_twin, text()), mapped(model, None))
    nbl.attach(twin, plan)
    assert same(output(fast_twin, text()), expected)
    assert same(output(fast, text()), expected)
    assert copy.deepcopy(plan) is plan


def test_a_deep_copy_of_the_compiled_model() -> None:
    model = tiny()
    fast = compiled(model, plan=plan_for(model))
    expected = output(fast, text())
    assert same(output(copy.deepcopy(fast), text()), expected)


def test_resetting_dynamo_loses_nothing() -> None:
    model = tiny()
    nbl.attach(model, plan_for(model))
    fast = compiled(model)
    before = output(fast, text())
    torch._dynamo.reset()
    assert same(output(fast, text()), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_cast_after_calibration_keeps_its_plan(dtype: torch.dtype) -> None:
    model = tiny()
    plan = plan_for(model)
    nbl.attach(model, plan)
    fast = compiled(model)
    expected = mapped(model, plan)
    output(fast, text())
    model.to(dtype)
    result = output(fast, text())
    assert result.dtype == dtype
    # A few rounding steps of the shorter dtype, through two layers, relative to the largest.
    tolerance = 30 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    assert (result - expected).abs().max() < tolerance * expected.abs().max()
    again = copy.deepcopy(model)
    nbl.attach(again, plan)  # another process would compare the cast weights like this
    assert torch.equal(output(compiled(again), text()), result)


def test_the_base_model_finds_the_plan_of_the_whole() -> None:
    model = tiny()
    nbl.attach(model, plan := plan_for(model))
    base = model.model
    with torch.no_grad():
        logits = model.lm_head(compiled(base)(text()).last_hidden_state)
    assert same(logits, mapped(model, plan))


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Any:
        return self.inner(*args)


def test_a_wrapper_finds_the_plan_of_what_it_wraps() -> None:
    model = tiny()
    nbl.attach(model, plan := plan_for(model))
    assert same(output(compiled(Wrapper(model)), text()), mapped(model, plan))


class Pair(nn.Module):
    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, ids: Tensor) -> Tensor:
        return sum(model(ids).logits for model in self.models)  # type: ignore[return-value]


def test_one_graph_of_models_with_different_plans() -> None:
    models = [tiny(seed=1), tiny(seed=2)]
    for model in models:
        nbl.attach(model, plan_for(model))
    with pytest.raises(PlanMismatchError, match="models with different plans; compile each"):
        compiled(Pair(*models).eval())(text())


def test_plans_go_with_their_models() -> None:
    model = tiny()
    nbl.attach(model, plan := plan_for(model))
    gone = weakref.ref(plan)
    del plan
    assert gone() is not None
    del model
    gc.collect()
    assert gone() is None


def test_a_plan_of_other_weights_is_not_attached() -> None:
    model, other = tiny(seed=1), tiny(seed=2)
    plan = plan_for(model)
    message = r"does not fit LlamaForCausalLM: its weight model\.embed_tokens\.weight of shape"
    with pytest.raises(PlanMismatchError, match=message):
        nbl.attach(other, plan)
    assert registry.find_plan(other.parameters()) is None


# Plans by path.


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "plan.safetensors"


def test_a_plan_by_its_path(path: Path) -> None:
    model = tiny()
    plan = plan_for(model)
    plan.save(path)
    for given in (path, str(path)):
        assert same(output(compiled(model, plan=given), text()), mapped(model, plan))


def test_a_path_serves_one_model_only(path: Path) -> None:
    """The same path makes the same backend, so Dynamo alone would reuse the first model's code."""
    model, other = tiny(seed=1), tiny(seed=2)
    plan_for(model).save(path)
    output(compiled(model, plan=str(path)), text())
    with pytest.raises(PlanMismatchError, match="not one that the plan was calibrated on"):
        output(compiled(other, plan=str(path)), text())


def test_all_graphs_share_one_loaded_plan(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    plan_for(model).save(path)
    loads: list[nbl.Plan] = []
    load = plan_file.load_plan

    def counting(given: str) -> nbl.Plan:
        loads.append(load(given))
        return loads[-1]

    monkeypatch.setattr(plan_file, "load_plan", counting)
    fast = torch.compile(
        model, backend="nbl", dynamic=False, options={"plan": str(path), "lowering": "eager"}
    )
    with compilations() as count:
        for length in (8, 12, 16):
            output(fast, text(length=length))
    assert count == [3]
    assert len(loads) == 1
    gone = weakref.ref(loads.pop())
    gc.collect()
    assert gone() is not None  # the graphs hold it
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None


def test_a_rewritten_file_is_read_again(path: Path) -> None:
    model = tiny()
    old, new = plan_for(model, 1), plan_for(model, 2)
    old.save(path)
    fast = compiled(model, plan=str(path))
    assert same(output(fast, text()), mapped(model, old))
    status, held = path.stat(), plan_file.load_shared(str(path))
    assert plan_file.load_shared(str(path)) is held
    new.save(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as on a coarse clock
    assert path.stat().st_size == status.st_size
    torch._dynamo.reset()
    assert same(output(fast, text()), mapped(model, new))


# Fingerprints.


def test_a_sketch_notices_every_kind_of_change() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(40, 30))
    own = sketch(weight)
    with torch.no_grad():
        changes = {
            "scaled": weight * 1.0001,
            "noisy": weight * (1 + 1e-2 * torch.randn_like(weight)),
            "rows permuted": weight[torch.randperm(40)],
            "columns permuted": weight[:, torch.randperm(30)],
            "negated": -weight,
            "transposed back": weight.reshape(30, 40).T.contiguous(),
            "reshaped": weight.reshape(30, 40),
            "one entry": weight + torch.eye(40, 30) * torch.eye(40)[:, :1],
        }
    for name, changed in changes.items():
        assert not own.matches(sketch(changed)), name
    assert own.matches(sketch(weight.detach().clone()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(640, 320), (32,), (1,), (4, 3, 5)])
def test_a_sketch_survives_a_cast(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for seed in range(20):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
        assert sketch(weight).matches(sketch(weight.to(dtype)))


def test_a_sketch_follows_changes_in_place() -> None:
    weight = nn.Parameter(torch.randn(5, 4))
    before = sketch(weight)
    with torch.no_grad():
        weight[0, 0] += 1
    assert not before.matches(sketch(weight))


def test_sketches_of_inference_tensors_and_under_autocast() -> None:
    weight = torch.randn(64, 64)
    with torch.inference_mode():
        inference = weight.clone()
    assert sketch(inference).matches(sketch(weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sketch(weight.clone()).matches(sketch(weight))
