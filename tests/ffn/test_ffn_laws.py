"""What must hold for every folded FFN, whatever calibration said: limits, shapes, dtypes, NaN."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from helpers.ffn_scenarios import full_run, subject
from helpers.ffn_surgery import LAYOUTS, fold_by_surgery
from helpers.own_ffn import NEURONS, WIDTH, OwnModel, compiled_ffn, folded, own_model, rows
from helpers.recording import rewritten_graphs
from helpers.scenarios import compile_with
from models.architectures import HIDDEN
from torch import Tensor, nn

import nbl_compiler as nbl
from nbl_compiler.passes.ffn_sites import load_folded

# Float32 rounding of sums over some ten neurons of order one; activations are of order one to ten.
ROUNDING = {"atol": 2e-5, "rtol": 2e-5}
# bfloat16 keeps 8 bits (4e-3 a step); relative to the deviation of the output.
BFLOAT16_ROUNDING = 3e-2
# No pre-activation comes near it.
EVERYWHERE = 1e6

FORMS: dict[str, dict[str, Any]] = {
    "folded": {"keep": 0},
    "kept": {"keep": 0.25},
    "whole": {"keep": 1.0},
    "predicted": {"keep": 0.25, "guard": "predicted", "capacity": 0.3},
    "exact": {"keep": 0, "guard": "exact"},
    "exact, 8 bits": {"keep": 0.25, "guard": "exact", "predictor": "quantized_8"},
}
OWN = [
    *((form, False) for form in FORMS),
    *((form, True) for form in FORMS if "exact" not in form),
]
every_form = pytest.mark.parametrize(("form", "gated"), OWN)


@dataclass(frozen=True)
class Own:
    """A small model of one FFN on a residual stream, its plan, and the plan by surgery."""

    model: OwnModel
    plan: nbl.Plan
    oracle: nn.Module


@cache
def own(form: str, gated: bool) -> Own:
    model = own_model(gated)
    plan = folded(model, **FORMS[form])
    nbl.attach(model, None)
    return Own(model, plan, surgery(model, plan, gated))


def surgery(model: nn.Module, plan: nbl.Plan, gated: bool = False) -> nn.Module:
    return fold_by_surgery(model, plan, LAYOUTS["own gated" if gated else "own gelu"])


def changed(plan: nbl.Plan, tensors: dict[str, Tensor], **details: Any) -> nbl.Plan:
    """Return the plan with other tensors and facts of its only site."""
    (site,) = plan.sites
    other = replace(site, tensors={**site.tensors, **tensors}, details={**site.details, **details})
    return replace(plan, sites=(other,))


def run(model: nn.Module, plan: nbl.Plan, x: Tensor, **options: Any) -> Tensor:
    """Run the model compiled with the plan; its FFN must be rewritten."""
    torch._dynamo.reset()
    with rewritten_graphs() as graphs, torch.no_grad():
        made: Tensor = compiled_ffn(model, plan, **options)(x)
    assert [len(load_folded(graph)) for graph in graphs] == [1]
    return made


# Limits.


@pytest.mark.parametrize("form", ["exact", "exact, 8 bits"])
def test_all_neurons_in_range_leave_the_affine_form(form: str) -> None:
    one = own(form, False)
    (site,) = one.plan.sites
    kept = site.tensors.get("kept", torch.zeros(0, dtype=torch.int64))
    limit = torch.full((NEURONS - len(kept),), EVERYWHERE)
    x = rows(seed=5)
    made = run(one.model, changed(one.plan, {"low": -limit, "high": limit}), x)
    ffn = one.model.layers[0]
    with torch.no_grad():
        hidden = ffn.act(ffn.up(x))[..., kept] @ ffn.down.weight[:, kept].T
    affine = x @ site.tensors["weight"].T + site.tensors["bias"]
    torch.testing.assert_close(made, x + hidden + affine, **ROUNDING)
    assert (made - run(one.model, one.plan, x)).abs().max() > 1000 * ROUNDING["atol"]


@pytest.mark.parametrize("capacity", [0, NEURONS])
@pytest.mark.parametrize("form", ["exact", "exact, 8 bits"])
def test_all_neurons_outside_give_the_dense_ffn(form: str, capacity: int) -> None:
    """By correcting each where there is room for all, by the dense path where there is none."""
    one = own(form, False)
    nowhere = torch.full_like(one.plan.sites[0].tensors["low"], EVERYWHERE)
    plan = changed(one.plan, {"low": nowhere, "high": nowhere}, capacity=capacity)
    made = run(one.model, plan, rows(seed=5))
    torch.testing.assert_close(made, one.model(rows(seed=5)), **ROUNDING)
    counts = plan.counters(plan.sites[0].name, torch.device("cpu"))
    assert bool(counts[3] == counts[0]) == (capacity == 0)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("predictor", ["none", "quantized_2"])
def test_a_predicted_guard_with_room_for_all_is_the_dense_ffn(gated: bool, predictor: str) -> None:
    """C and B are replaced by the fold of the slopes, as which the corrections take them."""
    model = own_model(gated)
    plan = folded(model, keep=0, guard="predicted", capacity=1.0, predictor=predictor)
    ffn, tensors = model.layers[0], plan.sites[0].tensors
    first = ffn.up.weight * tensors["up_slope"][:, None]
    offset = ffn.up.bias * tensors["up_slope"] + tensors["intercept"]
    if gated:
        first = first + ffn.gate.weight * tensors["gate_slope"][:, None]
        offset = offset + ffn.gate.bias * tensors["gate_slope"]
    with torch.no_grad():
        matrix, bias = ffn.down.weight @ first, ffn.down.weight @ offset + ffn.down.bias
    made = run(model, changed(plan, {"weight": matrix, "bias": bias}), rows(seed=5))
    torch.testing.assert_close(made, model(rows(seed=5)), **ROUNDING)


@pytest.mark.parametrize("guard", ["off", "predicted", "exact"])
@pytest.mark.parametrize("gated", [False, True])
def test_keeping_every_neuron_is_the_dense_ffn(gated: bool, guard: str) -> None:
    model = own_model(gated)
    plan = folded(model, keep=1.0, guard=guard)
    assert (plan.sites[0].nmse, plan.sites[0].holdout_nmse) == (0.0, 0.0)
    x = 100 * rows(seed=5)  # beyond anything calibration saw
    dense = model(x)
    atol = ROUNDING["atol"] * dense.abs().max().item()
    torch.testing.assert_close(run(model, plan, x), dense, atol=atol, rtol=0)


# Shapes.

SHAPES = [(), (1,), (0,), (5,), (0, 5), (2, 0), (1, 1), (3, 7), (2, 3, 5)]


@pytest.mark.parametrize("shape", SHAPES)
@every_form
def test_any_shape(form: str, gated: bool, shape: tuple[int, ...]) -> None:
    one = own(form, gated)
    x = rows(1, 30, seed=5)[0, : max(torch.Size(shape).numel(), 0)].reshape(*shape, WIDTH)
    made = run(one.model, one.plan, x)
    if x.numel():
        torch.testing.assert_close(made, one.oracle(x), **ROUNDING)
    assert made.shape == x.shape


@pytest.mark.parametrize("lowering", ["eager", "aot_eager"])
@every_form
def test_one_graph_serves_every_shape(form: str, gated: bool, lowering: str) -> None:
    one = own(form, gated)
    fast = compiled_ffn(one.model, one.plan, dynamic=True, lowering=lowering)
    with rewritten_graphs() as graphs, torch.no_grad():
        for shape in ((4, 10), (3, 7), (9, 33)):
            x = rows(*shape, seed=5)
            torch.testing.assert_close(fast(x), one.oracle(x), **ROUNDING)
    assert len(graphs) == 1


# Dtypes.


@every_form
def test_a_model_cast_after_calibration(form: str, gated: bool) -> None:
    one = own(form, gated)
    model = copy.deepcopy(one.model).to(torch.bfloat16)
    x = rows(seed=5).to(torch.bfloat16)
    made, expected = run(model, one.plan, x), surgery(model, one.plan, gated)(x)
    assert made.dtype == torch.bfloat16
    scale = expected.float().std().item()
    if form.startswith("exact"):  # a neuron at an end of its range may fall on its other side
        error = (made.float() - expected.float()).square().mean().sqrt()
        assert error < BFLOAT16_ROUNDING * scale
    else:
        atol = BFLOAT16_ROUNDING * scale
        torch.testing.assert_close(made, expected, atol=atol, rtol=BFLOAT16_ROUNDING)
    assert (made.float() - one.oracle(x.float())).abs().max() < 0.3 * scale


def test_a_cast_and_an_uncast_model_share_a_plan() -> None:
    one = own("kept", False)
    half = copy.deepcopy(one.model).to(torch.bfloat16)
    x = rows(seed=5)
    first = run(one.model, one.plan, x)
    run(half, one.plan, x.to(torch.bfloat16))
    assert torch.equal(run(one.model, one.plan, x), first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("form", ["kept", "predicted", "exact"])
def test_calibrating_in_another_dtype(form: str, dtype: torch.dtype) -> None:
    one = own(form, False)
    model = copy.deepcopy(one.model).to(dtype)
    plan = folded(model, [rows(seed=seed).to(dtype) for seed in range(3)], **FORMS[form])
    assert plan.sites[0].nmse == pytest.approx(one.plan.sites[0].nmse, rel=0.1)
    assert {t.dtype for t in plan.tensors().values()} <= {torch.float32, torch.int64, torch.uint8}
    x = rows(seed=5).to(dtype)
    made = run(model, plan, x)
    assert made.dtype == dtype
    assert (made - model(x)).double().square().mean() < 2 * (
        one.oracle(rows(seed=5)) - one.model(rows(seed=5))
    ).double().square().mean()


@pytest.mark.parametrize(("name", "form"), [("llama", "kept"), ("gpt2", "exact")])
def test_a_transformer_cast_after_calibration(name: str, form: str) -> None:
    one = subject(name, form)
    model = copy.deepcopy(one.model).to(torch.bfloat16)
    oracle = fold_by_surgery(model, one.plan, LAYOUTS[name])
    given = {"input_ids": torch.arange(5, 29).reshape(2, 12), "use_cache": False}
    with torch.no_grad():
        made = compile_with(model, one.plan)(**given).logits.float()
        expected = oracle(**given).logits.float()
    error = (made - expected).square().mean().sqrt() / expected.std()
    assert error < BFLOAT16_ROUNDING


# NaN and infinity.


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@every_form
def test_values_that_are_not_finite(form: str, gated: bool, poison: float) -> None:
    """A guarded FFN makes of them what the dense one does; the others something not finite."""
    one = own(form, gated)
    x = rows(2, 5, seed=5)
    x[1, 3, 2] = poison
    ffn = one.model.layers[0]
    made, dense = run(one.model, one.plan, x), one.model(x)
    assert torch.equal(made.isfinite(), dense.isfinite())
    assert not dense[1, 3].isfinite().any()
    if FORMS[form].get("guard") is not None:
        where = ~dense.isfinite()
        torch.testing.assert_close(made[where], dense[where], equal_nan=True, **ROUNDING)
    assert ffn.down.weight.isfinite().all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "form"), [("llama", "kept"), ("llama", "predicted"), ("gpt2", "exact")]
)
def test_embeddings_that_are_not_finite(name: str, form: str, poison: float) -> None:
    one = subject(name, form)
    embedded = torch.randn(2, 6, HIDDEN, generator=torch.Generator().manual_seed(3))
    embedded[1, 2, 4] = poison
    given = {"inputs_embeds": embedded, "use_cache": False}
    with torch.no_grad():
        made = compile_with(one.model, one.plan)(**given).logits
        dense = one.model(**given).logits
    assert torch.equal(made.isnan(), dense.isnan())
    assert dense[1, 2:].isnan().all()  # causal: all that follows, and no other row
    assert made[0].isfinite().all()


def test_a_model_without_the_plan_is_as_it_was() -> None:
    """Calibration and compilation leave the model's own weights and results alone."""
    run_ = full_run("llama", "kept")
    one = run_.subject
    fresh = subject.__wrapped__("llama", "kept").model
    for (name, own_), (_, other) in zip(
        one.model.named_parameters(), fresh.named_parameters(), strict=True
    ):
        assert torch.equal(own_, other), name
