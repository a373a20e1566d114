"""``nbl.plan`` on tiny models: what it measures is what the compiled plan does."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch._dynamo
from helpers.tiny import compiled, text, tiny
from torch import nn
from torch.fx import GraphModule

import nbl_compiler as nbl
from nbl_compiler import site_timing
from nbl_compiler.cost import Machine
from nbl_compiler.errors import ConfigError, NBLWarning
from nbl_compiler.int8_weights import is_quantized
from nbl_compiler.planning import plan_for_budget
from nbl_compiler.planning.costs import step_cost
from nbl_compiler.planning.front import Point, pick
from nbl_compiler.plans import Plan
from nbl_compiler.shared_copy import int8_copy

pytestmark = pytest.mark.usefixtures("fixed_rates")
CONTEXT = 64
# float32 forward passes of a tiny model, compared through a softmax
KL_ROUNDING = 1e-5
SPACE = nbl.Space(ffns=(nbl.FFN(keep=0.5), nbl.FFN(keep=0.25)))


@cache
def planned(name: str = "llama") -> tuple[nn.Module, list[torch.Tensor], nbl.Front]:
    """Return a model, its batches, and the front of a generous budget."""
    model = tiny(name, layers=3)
    batches = [text(batch=8, length=64, seed=seed) for seed in range(4)]
    phase = "decode" if name == "llama" else "prefill"
    budget = nbl.Budget(max_loss=0.5, context=CONTEXT, phase=phase)
    return model, batches, nbl.plan(model, batches, budget, SPACE, progress=False)


def test_the_front_rises_and_the_budget_picks_from_it() -> None:
    _, _, front = planned()
    losses = [point.loss for point in front.points]
    speeds = [point.speedup for point in front.points]
    assert losses == sorted(losses)
    assert speeds == sorted(speeds)
    assert losses[0] == 0.0
    assert front.points[0].choices == {}
    within = [i for i, loss in enumerate(losses) if loss <= 0.5]
    assert front.chosen == within[-1] > 0


def test_the_chosen_plan_is_attached_and_does_what_was_chosen() -> None:
    model, _, front = planned()
    point = front.points[front.chosen]
    assert {site.name for site in front.plan.rewritten} == set(point.choices)
    assert len(front.plan.sites) == 6
    reports: list[Any] = []
    options = {"plan": front.plan, "lowering": "eager", "report": reports.append, "strict": True}
    with torch.no_grad():
        torch.compile(model, backend="nbl", options=options)(text())
    assert sorted(reports[0].rewritten) == sorted(point.choices)
    kept = [site for site in front.plan.sites if site.decision == "kept"]
    assert all(site.reason == "left dense by the budget" and not site.tensors for site in kept)


def test_the_loss_of_a_point_is_that_of_its_compiled_plan() -> None:
    """The worst of three kinds of text; on the rows as they are, at most the point's loss."""
    model, batches, front = planned()
    last = batches[-1]
    for index in (1, front.chosen):
        options = {"plan": front.plan_at(index), "lowering": "eager"}
        torch._dynamo.reset()
        fast = torch.compile(model, backend="nbl", options=options)
        with torch.no_grad():
            dense, ours = (m(last, use_cache=False).logits.log_softmax(-1) for m in (model, fast))
        divergence = float((dense.exp() * (dense - ours)).sum(-1).mean())
        assert 0 < divergence <= torch.tensor(front.points[index].loss).log1p() + KL_ROUNDING


def test_the_default_space_is_what_can_make_the_step_faster() -> None:
    one, few, many = (nbl.Budget(speedup=2.0, batch=batch) for batch in (1, 4, 5))
    prompt = nbl.Budget(speedup=2.0, context=64, phase="prefill")
    forms = [nbl.Space.suited_to(budget).ffns for budget in (one, few, many, prompt)]
    guarded = [[form.guard for form in some] for some in forms]
    assert guarded == [["predicted"], ["predicted"], ["off"], ["off"]]


def test_every_point_of_the_front_has_a_plan() -> None:
    _, _, front = planned()
    sizes = [len(front.plan_at(index).rewritten) for index in range(len(front.points))]
    assert sizes == [len(point.choices) for point in front.points]
    assert front.plan_at(front.chosen).digest == front.plan.digest


def test_a_model_without_logits_is_planned_by_its_output() -> None:
    _, _, front = planned("bert")
    assert front.points[front.chosen].choices
    assert front.points[front.chosen].loss <= 0.5


def test_a_front_is_shown() -> None:
    _, _, front = planned()
    shown = str(front)
    assert "plans for decode, 64 tokens of context, batch 1" in shown
    assert "→" in shown
    assert "linear attention, with mixed values" in shown
    assert front.as_json()["points"][front.chosen]["loss"] == front.points[front.chosen].loss


def test_a_longer_context_makes_attention_worth_more() -> None:
    """Linear attention saves the reading of its cache, which grows with the context."""
    model, batches, _ = planned()
    plan = nbl.calibrate(
        model, batches, nbl.Config(attention=nbl.Attention(layers=(0, 1, 2))), progress=False
    )
    machine = Machine(1e9, 1e12, 1e9)

    def saved(context: int) -> float:
        budget = nbl.Budget(speedup=2.0, context=context)
        dense, made = (step_cost(model, p, budget, machine) for p in (Plan(), plan))
        assert set(made.after) == {site.name for site in plan.rewritten}
        return sum(dense.before[name] - made.after[name] for name in made.after)

    short, long = saved(16), saved(112)
    heads, width, tensors, layers = 2, 8, 2, 3
    cached = (112 - 16) * heads * width * tensors * 4 * layers / 1e9
    assert long - short > cached


def test_measured_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sites of one kind are timed once; what is measured takes the roofline's place."""
    model, batches, _ = planned()
    config = nbl.Config(nbl.Attention(layers=(0, 1, 2)), nbl.FFN(layers=(0, 1, 2), keep=0.25))
    plan = nbl.calibrate(model, batches, config, progress=False)
    pieces: list[GraphModule] = []

    def compiled_in_a_moment(piece: GraphModule, values: list[Any], _: str) -> Any:
        pieces.append(piece)
        with torch.no_grad():
            assert piece(*values)  # the region runs on the values that enter it
        return lambda: None

    clock = iter(range(10_000))
    monkeypatch.setattr(site_timing, "_ready", compiled_in_a_moment)
    monkeypatch.setattr(site_timing, "seconds_of", lambda _: float(next(clock)))
    machine = Machine(1e9, 1e12, 1e9)
    budget = nbl.Budget(speedup=2.0, context=32)
    dense = step_cost(model, Plan(), budget, machine, measure=True)
    assert len(pieces) == 4  # attention and FFN, by Inductor alone and by this backend
    assert len(set(dense.before.values())) == 2
    assert len(dense.before) == 6
    plain = step_cost(model, Plan(), budget, machine)
    measured, roofline = (sum(cost.before.values()) for cost in (dense, plain))
    assert dense.total - measured == pytest.approx(plain.total - roofline)
    pieces.clear()
    made = step_cost(model, plan, budget, machine, measure=True)
    assert len(pieces) == 2
    assert set(made.after) == set(dense.before)


def test_a_plan_for_int8_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps cost what they do on the quantized model; the plan is calibrated on the float one."""
    model, batches = tiny(layers=1), [text(batch=8, length=64, seed=seed) for seed in range(2)]
    machine = Machine(1e9, 1e12, 1e9, 1e9)
    monkeypatch.setattr(plan_for_budget, "measure_machine", lambda **_: machine)
    budget = nbl.Budget(max_loss=0.5, context=CONTEXT, int8=True)
    found = nbl.plan(model, batches, budget, progress=False)
    assert "decode, 64 tokens of context, batch 1, int8 weights" in str(found)
    assert not any(is_quantized(parameter) for parameter in model.parameters())
    quantized = int8_copy(model)
    loaded, held = (step_cost(m, Plan(), budget, machine) for m in (model, quantized))
    assert found.points[0].speedup == pytest.approx(loaded.dense / held.total)
    assert all(0 < choice.seconds < held.before[choice.site] for choice in found.tried)
    assert held.before.keys() == loaded.before.keys()
    assert all(held.before[name] < loaded.before[name] for name in loaded.before)
    assert found.chosen > 0
    with torch.no_grad():
        run = compiled(quantized, plan=found.plan, strict=True)(text())
    assert run.logits.isfinite().all()


def test_guards_are_not_planned_for_int8_weights() -> None:
    budget = nbl.Budget(speedup=2.0, int8=True)
    assert [form.guard for form in nbl.Space.suited_to(budget).ffns] == ["off"]
    with pytest.raises(ConfigError, match="guarded FFNs gather rows of float weights"):
        nbl.plan(tiny(), [text()], budget, nbl.Space())


def points(*pairs: tuple[float, float]) -> list[Point]:
    return [Point(loss, speedup, {}, 0) for loss, speedup in pairs]


def test_what_budgets_pick() -> None:
    some = points((0.0, 1.0), (0.01, 1.2), (0.05, 1.6), (0.4, 2.5))
    assert pick(some, nbl.Budget(max_loss=0.02)) == 1
    assert pick(some, nbl.Budget(max_loss=0.001)) == 0
    assert pick(some, nbl.Budget(speedup=1.3)) == 2
    with pytest.warns(NBLWarning, match=r"no plan reaches 3× .* took the fastest, 2\.50×"):
        assert pick(some, nbl.Budget(speedup=3.0)) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either max_loss or speedup"),
        ({"max_loss": 0.1, "speedup": 2.0}, "give either max_loss or speedup"),
        ({"max_loss": 0}, "max_loss=0 must be positive: 0.02 is 2 %"),
        ({"max_loss": "2%"}, "max_loss='2%' must be positive"),
        ({"speedup": 1.0}, "speedup=1.0 must exceed 1"),
        ({"speedup": 2.0, "context": 0}, "context=0 must be an integer of at least 1"),
        ({"speedup": 2.0, "batch": 1.5}, "batch=1.5 must be an integer"),
        ({"speedup": 2.0, "int8": 1}, "int8=1 must be True or False"),
        ({"speedup": 2.0, "phase": "train"}, "phase='train' must be 'decode' or 'prefill'"),
    ],
)
def test_budgets_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        nbl.Budget(**options)


def test_spaces_that_make_no_sense() -> None:
    with pytest.raises(ConfigError, match="give attention or at least one FFN form"):
        nbl.Space(attention=None, ffns=())
    with pytest.raises(ConfigError, match="Attention says which sites to take"):
        nbl.Space(attention=nbl.Attention(count=2))
    with pytest.raises(ConfigError, match="FFN says which sites to take"):
        nbl.Space(ffns=(nbl.FFN(max_nmse=0.1),))


def test_an_encoder_has_no_decode_step() -> None:
    model = tiny("bert")
    with pytest.raises(ConfigError, match=r"plan it with Budget\(phase='prefill'\)"):
        step_cost(model, Plan(), nbl.Budget(speedup=2.0), Machine(1e9, 1e12))
