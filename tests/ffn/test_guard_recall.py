"""``nbl.guard_recall`` against recall by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.ffn_calibrating import dense_inputs
from helpers.guard_subjects import (
    EXACT,
    FOLDED,
    Subject,
    exact,
    fresh,
    preactivations,
    predicted,
    predictions,
)
from helpers.own_ffn import WIDTH, compiled_ffn, folded, own_model, rows, stream
from torch import Tensor

import nbl_compiler as nbl
from nbl_compiler.errors import (
    CalibrationError,
    PlanMismatchError,
    WeightsReleasedError,
)


def recall_by_hand(one: Subject, layer: int, x: Tensor) -> float:
    """Share of each token's truly worst neurons that are among those predicted to be."""
    site, weights = one.plan.sites[layer], one.folded_weights(layer)
    fit = {name: site.tensors[name].double() for name in ("up_slope", "intercept")}
    gate_slope = site.tensors.get("gate_slope", torch.zeros(())).double()

    def worst(z: Tensor) -> Tensor:
        gate, up = z[:, :FOLDED], z[:, -FOLDED:]
        hidden = F.gelu(gate) * up if one.gated else F.gelu(up)
        fitted = fit["up_slope"] * up + gate_slope * gate + fit["intercept"]
        score = (hidden - fitted).abs() * weights.w2.norm(dim=0)
        chosen = score.topk(site.details["capacity"], dim=1).indices
        return torch.zeros_like(score, dtype=torch.bool).scatter(1, chosen, True)

    wanted = worst(preactivations(weights, x))
    return float((worst(predictions(site, x)) & wanted).sum() / wanted.sum())


@pytest.mark.parametrize(
    ("form", "gated"),
    [("8 bits", False), ("4 bits", True), ("low rank", False), ("low rank", True)],
)
def test_recall_of_a_predicted_guard_is_that_by_hand(form: str, gated: bool) -> None:
    one = predicted(form, gated)
    x = rows(4, 25, seed=7)
    measured = nbl.guard_recall(one.model, one.plan, x)
    expected = [recall_by_hand(one, i, part) for i, part in enumerate(dense_inputs(one.model, x))]
    assert list(measured) == one.names
    # One neuron of 100 tokens with 8 outliers each, should rounding swap two scores.
    assert list(measured.values()) == pytest.approx(expected, abs=1 / 800)
    # Some are missed, though of 8 bits hardly any.
    assert 0.3 < min(expected) < 1


def test_recall_without_a_predictor_is_one() -> None:
    one = predicted("true", False)
    assert set(nbl.guard_recall(one.model, one.plan, rows(seed=7)).values()) == {1.0}


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("form", EXACT)
def test_recall_of_an_exact_guard_is_one(form: str, scale: float) -> None:
    """Also with tokens on the dense path, where every neuron is as in the dense FFN."""
    one = exact(form)
    measured = nbl.guard_recall(one.model, one.plan, scale * rows(seed=7))
    assert measured == dict.fromkeys(one.names, 1.0)
    assert {site.details["recall"] for site in one.plan.sites} == {1.0}


@pytest.mark.parametrize(("form", "gated"), [("4 bits", True), ("low rank", False)])
def test_the_plan_says_the_recall_on_its_calibration_text(form: str, gated: bool) -> None:
    one = predicted(form, gated)
    measured = nbl.guard_recall(one.model, one.plan, torch.cat(stream()))
    assert measured == {site.name: site.details["recall"] for site in one.plan.sites}


def test_padding_does_not_count() -> None:
    one = predicted("4 bits", True)
    x, mask = rows(4, 25, seed=7), torch.ones(4, 25)
    x[1:, 9:], mask[1:, 9:] = 40.0, 0
    real = x.view(-1, WIDTH)[mask.view(-1) == 1][None]
    alone = nbl.guard_recall(one.model, one.plan, real)
    padded = nbl.guard_recall(one.model, one.plan, {"x": x, "attention_mask": mask})
    assert padded == pytest.approx(alone, abs=1 / (8 * real.shape[1]))
    assert nbl.guard_recall(one.model, one.plan, x) != pytest.approx(alone, abs=0.01)


def test_measuring_recall_changes_nothing() -> None:
    one = fresh(exact("4 bits"))
    nbl.attach(one.model, one.plan)
    run = torch.no_grad()(compiled_ffn(one.model))
    before = run(rows(2, 9))
    counts = nbl.guard_counts(one.plan)
    nbl.guard_recall(one.model, one.plan, rows(3, 5))
    assert nbl.guard_counts(one.plan) == counts
    assert torch.equal(run(rows(2, 9)), before)
    nbl.attach(one.model, None)


def test_the_recall_of_a_model_that_is_compiled() -> None:
    one = predicted("4 bits", True)
    x = rows(2, 9, seed=7)
    compiled = compiled_ffn(one.model, one.plan)
    assert nbl.guard_recall(compiled, one.plan, x) == nbl.guard_recall(one.model, one.plan, x)


@pytest.mark.parametrize("batch", ["a text", [rows(1, 2), rows(1, 2)], 7])
def test_batches_of_the_wrong_kind(batch: Any) -> None:
    one = exact("true")
    with pytest.raises(CalibrationError, match=f"it gave a {type(batch).__name__}"):
        nbl.guard_recall(one.model, one.plan, batch)


@pytest.mark.parametrize("gated", [False, True])
def test_the_recall_of_another_model_is_refused(gated: bool) -> None:
    other = own_model(gated, gated, seed=3)
    with pytest.raises(PlanMismatchError, match="does not fit"):
        nbl.guard_recall(other, exact("4 bits").plan, rows(2, 9))


def test_the_recall_of_a_released_model_is_refused() -> None:
    model = own_model(False)
    plan = folded(model, keep=0, guard="predicted")
    nbl.release(model, plan, rows(2, 9))
    with pytest.raises(WeightsReleasedError, match="recall needs 4 weight"):
        nbl.guard_recall(model, plan, rows(2, 9))
