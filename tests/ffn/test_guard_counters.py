"""Counters and recall of guards against counts by hand, in plain torch and float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.ffn_calibrating import dense_inputs
from helpers.ffn_surgery import (
    LAYOUTS,
    Layout,
    Weights,
    fold_by_surgery,
    folded_parts,
    read_weights,
)
from helpers.own_ffn import NEURONS, WIDTH, OwnModel, compiled_ffn, folded, own_model, rows, stream
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import nbl_compiler as nbl
from nbl_compiler import GuardCounts
from nbl_compiler.errors import (
    CalibrationError,
    ConfigError,
    PlanMismatchError,
    WeightsReleasedError,
)
from nbl_compiler.lowering.predictors import NORM_SLACK
from nbl_compiler.plan import Site

KEEP = 0.25
FOLDED = NEURONS - round(KEEP * NEURONS)
# Calls of several shapes: a batch, one token, none, a prompt.
SHAPES = ((3, 17), (1, 1), (2, 0), (1, 40))

EXACT: dict[str, dict[str, Any]] = {
    "true": {"capacity": 0.2},
    "8 bits": {"predictor": "quantized_8", "capacity": 0.2},
    "4 bits": {"predictor": "quantized_4", "capacity": 0.4},
    "2 bits": {"predictor": "quantized_2", "capacity": 0.6},
}
PREDICTED: dict[str, dict[str, Any]] = {
    "true": {"predictor": "none"},
    "8 bits": {"predictor": "quantized_8"},
    "4 bits": {},
    "low rank": {"predictor": "low_rank", "rank": 4},
}
NOTHING = GuardCounts(0, 0, 0, 0)


@dataclass(frozen=True)
class Subject:
    """A model and a plan that guards all its FFNs."""

    model: OwnModel
    plan: nbl.Plan
    gated: bool

    @property
    def names(self) -> list[str]:
        """The sites."""
        return [site.name for site in self.plan.sites]

    def compile(self, **options: Any) -> Callable[[Tensor], Tensor]:
        """Return the compiled model; it runs without gradients."""
        return torch.no_grad()(compiled_ffn(self.model, self.plan, **options))

    @property
    def layout(self) -> Layout:
        """Of the FFNs."""
        return LAYOUTS["own gated" if self.gated else "own gelu"]

    def folded_weights(self, layer: int) -> Weights:
        """The folded neurons of one FFN, in float64."""
        left = torch.ones(NEURONS, dtype=torch.bool)
        left[self.plan.sites[layer].tensors["kept"]] = False
        return read_weights(self.model.layers[layer], self.layout).select(left)

    def count(self, calls: list[Tensor]) -> dict[str, GuardCounts]:
        """Count by hand what the guards do in these calls."""
        oracle = fold_by_surgery(self.model, self.plan, self.layout).double()
        seen: list[list[Tensor]] = []
        for part in folded_parts(oracle):
            seen.append([torch.zeros(0, WIDTH, dtype=torch.float64)])
            part.register_forward_pre_hook(lambda _, args, own=seen[-1]: own.append(args[0]))
        for x in calls:
            if x.numel():
                oracle(x.double())
        counts = {}
        for layer, (site, own) in enumerate(zip(self.plan.sites, seen, strict=True)):
            flagged = self._flagged(layer, torch.cat([x.reshape(-1, WIDTH) for x in own]))
            dense = flagged > site.details["capacity"]
            counts[site.name] = GuardCounts(
                len(flagged),
                int(flagged.sum()),
                max(flagged.tolist(), default=0),
                int(dense.sum()) if site.details["guard"] == "exact" else 0,
            )
        return counts

    def _flagged(self, layer: int, x: Tensor) -> Tensor:
        """Flagged neurons per token, [tokens]."""
        site = self.plan.sites[layer]
        if site.details["guard"] == "predicted":
            return torch.full((len(x),), FOLDED)
        if site.details["predictor"] == "none":
            z, slack = preactivations(self.folded_weights(layer), x), torch.zeros(())
        else:
            z, slack = predictions(site, x), certificate(site, x)
        low, high = site.tensors["low"].double(), site.tensors["high"].double()
        return ((z - slack < low) | (z + slack > high)).sum(1)


def preactivations(weights: Weights, x: Tensor) -> Tensor:
    """The neurons' pre-activations, of gated ones the gate's first."""
    first = x @ weights.w1.T + weights.b1
    if weights.w_up is None or weights.b_up is None:
        return first
    return torch.cat([first, x @ weights.w_up.T + weights.b_up], dim=1)


def predictions(site: Site, x: Tensor) -> Tensor:
    """The same as the site's predictor says."""
    stored = [site.tensors[f"predictor_{i}"] for i in range(4) if f"predictor_{i}" in site.tensors]
    if site.details["predictor"] == "low_rank":
        basis, coefficients, offset = (tensor.double() for tensor in stored)
        return x @ basis.T @ coefficients.T + offset
    codes, (scale, shift, offset) = stored[0].long(), (tensor.double() for tensor in stored[1:])
    bits = int(site.details["predictor"][-1])
    planes = [(codes >> place) % 2**bits for place in range(0, 8, bits)]
    unpacked = torch.cat(planes, dim=1).double() * scale[:, None] + shift[:, None]
    return x @ unpacked.T + offset


def certificate(site: Site, x: Tensor) -> Tensor:
    """How far its predictions may be off, norms being widened for their own rounding."""
    radius, rounding, centre = (site.tensors[f"predictor_{i}"].double() for i in range(4, 7))
    distance = (x - centre).norm(dim=1, keepdim=True) * NORM_SLACK
    return distance * radius + (x.norm(dim=1, keepdim=True) * NORM_SLACK + 1) * rounding


@cache
def exact(form: str, layers: int = 2) -> Subject:
    model = own_model(*[False] * layers)
    plan = folded(model, [torch.cat(stream())], keep=KEEP, guard="exact", **EXACT[form])
    nbl.attach(model, None)
    return Subject(model, plan, gated=False)


@cache
def predicted(form: str, gated: bool) -> Subject:
    model = own_model(gated, gated)
    batches = [torch.cat(stream())]
    plan = folded(model, batches, keep=KEEP, guard="predicted", capacity=0.3, **PREDICTED[form])
    nbl.attach(model, None)
    return Subject(model, plan, gated)


def fresh(one: Subject) -> Subject:
    """The same with counters that nothing has touched."""
    return Subject(one.model, nbl.Plan(one.plan.sites, one.plan.fingerprint), one.gated)


def calls(*seeds: int) -> list[Tensor]:
    """Inputs of every shape; wider than what calibration saw, so that tokens run dense."""
    return [1.5 * rows(*shape, seed=seed) for seed in seeds for shape in SHAPES]


# Counters.


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


# Recall.


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
    assert all(0.3 < value < 1 for value in expected)


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
