"""No input, however it was found, moves a compiled FFN further than the plan's bound says.

``solvers/test_ffn_bounds`` has the mathematics alone; here are calibrated plans and what the
backend made of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from helpers.own_ffn import OwnFFN, compiled_ffn, ffn_config, folded, rows
from helpers.tiny import texts, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from models.architectures import HIDDEN
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import nbl_compiler as nbl
from nbl_compiler.plans import Site

WIDTH, NEURONS = 8, 24
ACTIVATIONS: dict[str, nn.Module] = {
    "gpt2": nn.GELU(approximate="tanh"),
    "opt": nn.ReLU(),
    "bert": nn.GELU(),
}
# With room for all neurons every token is put together from its parts; without, some run dense.
FORMS: dict[str, dict[str, Any]] = {
    "true": {},
    "true, room for all": {"capacity": 1.0},
    "8 bits, room for all": {"predictor": "quantized_8", "capacity": 1.0},
    "4 bits": {"predictor": "quantized_4"},
    "2 bits, room for all": {"predictor": "quantized_2", "capacity": 1.0},
}
# Upper bound on |σ'| of all these activations (of GELU it is 1.13).
STEEPEST = 1.2
# Roundings of one chain besides those of its sums over d inputs and f neurons: σ of a rounded
# argument (a few units in the last place for each of its steps), slope, intercept, additions.
FURTHER_ROUNDINGS = 32
# Share of the bound that an attack must reach (with d < f not all neurons can be at their worst
# together). Measured: 0.28 to 0.41 for every output; 0.22 to 0.41 for the worst output of the
# models of transformers, whose d is 32.
NEAR, NEAR_IN_MANY_DIMENSIONS = 0.2, 0.1
# With d ≥ f, for the worst output and sign. Measured: 0.93 and more. Least-squares fits have larger
# errors on one side than on the other, so it is not 1.
ATTAINED = 0.8
STORED = 2.0**-24  # unit roundoff of float32, in which the plan keeps C and B


class Alone(nn.Module):
    """An FFN without a residual stream, so that its output is the model's."""

    def __init__(self, ffn: nn.Module) -> None:
        super().__init__()
        self.ffn = ffn

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.ffn(x)
        return y


@dataclass(frozen=True)
class Weights:
    """An FFN in float64 with its plan's fits; those of kept neurons (not ``folded``) are 0."""

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    slope: Tensor
    intercept: Tensor
    low: Tensor
    high: Tensor
    folded: Tensor
    matrix: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Subject:
    """A dense FFN and what the backend made of it, in float32 and in float64.

    Args:
        dense: The FFN by dtype.
        compiled: The same behind the plan.
        site: The plan's site.
        weights: For computing by hand.
        activation: σ.
    """

    dense: dict[torch.dtype, Callable[[Tensor], Tensor]]
    compiled: dict[torch.dtype, Callable[[Tensor], Tensor]]
    site: Site
    weights: Weights
    activation: nn.Module

    @property
    def bound(self) -> Tensor:
        """The certified error of every output, [d_out] float64."""
        return self.site.tensors["bound"].double()

    def error(self, x: Tensor) -> Tensor:
        """What the plan changes: y − y_dense in the dtype of ``x``, [tokens, d_out] float64."""
        with torch.no_grad():
            made, dense = self.compiled[x.dtype](x), self.dense[x.dtype](x)
        return made.double() - dense.double()

    def allowance(self, x: Tensor) -> Tensor:
        """What rounding may add to |y − y_dense|, [tokens, d_out].

        Both sides are sums and products in a chain of at most n = d + f + 32 roundings, so each
        is wrong by at most γ_n = n·u / (1 − n·u) times the sum T of the magnitudes of its terms,
        in whatever order they were added (Higham, Accuracy and Stability, lemma 3.1 and section
        3.5). There are three chains, the dense FFN, C x + B, and the corrections; a fourth γ_n T
        is for neurons so near to an end of their range that rounding decides on which side they
        are. C and B were rounded once more when they were stored.
        """
        one, size = self.weights, x.double().abs()
        roundings = sum(one.w1.shape) + FURTHER_ROUNDINGS
        unit = roundings * torch.finfo(x.dtype).eps / 2
        reach = size @ one.w1.abs().T + one.b1.abs()  # |z| at most, and so |σ(z)|
        affine = size @ one.matrix.abs().T + one.bias.abs()
        hidden = (STEEPEST + one.slope.abs()) * reach + one.intercept.abs()
        terms = hidden @ one.w2.abs().T + one.b2.abs() + affine
        return 4 * unit / (1 - unit) * terms + STORED * affine

    def formula(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the plan ought to change, and for which inputs rounding has no say in it.

        Σ_{i in range} W2[:, i] (ĥ_i − h_i), [tokens, d_out] float64, unless the token runs dense;
        and bool [tokens]: whether all pre-activations are clear of the ends of their ranges.
        """
        one, act = self.weights, self.activation
        z = x @ one.w1.T + one.b1
        inside = (z >= one.low) & (z <= one.high) & one.folded
        residual = torch.where(inside, one.slope * z + one.intercept - act(z), 0.0)
        reach = x.abs() @ one.w1.abs().T + one.b1.abs()
        distance = torch.minimum((z - one.low).abs(), (z - one.high).abs())
        clear = (distance > 1e-12 * reach) | ~one.folded
        return residual @ one.w2.T, clear.all(1)


def own_ffn(family: str, width: int = WIDTH, neurons: int = NEURONS) -> OwnFFN:
    torch.manual_seed(1)
    ffn = OwnFFN(width=width, neurons=neurons)
    ffn.act = ACTIVATIONS[family]
    with torch.no_grad():
        for parameter in ffn.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(scale * torch.randn(parameter.shape))
    return ffn.eval()


def make(
    family: str, model: nn.Module, plan: nbl.Plan, ffn_of: Callable[[nn.Module], nn.Module]
) -> Subject:
    """Return the model's FFN, compiled by itself, and its plan's only site."""
    nbl.attach(model, None)
    (site,) = plan.rewritten
    models = {torch.float32: model, torch.float64: copy.deepcopy(model).double()}
    dense = {dtype: Alone(ffn_of(one)).eval() for dtype, one in models.items()}
    compiled = {dtype: compiled_ffn(one, plan, dynamic=True) for dtype, one in dense.items()}
    weights = read_weights(dense[torch.float64], site)
    return Subject(dense, compiled, site, weights, ACTIVATIONS[family])


def read_weights(dense: nn.Module, site: Site) -> Weights:
    first, second = (m for m in dense.modules() if isinstance(m, nn.Linear | Conv1D))
    w1, w2 = (
        layer.weight.detach().T if isinstance(layer, Conv1D) else layer.weight.detach()
        for layer in (first, second)
    )
    left = torch.ones(w1.shape[0], dtype=torch.bool)
    left[site.tensors.get("kept", torch.zeros(0, dtype=torch.int64))] = False
    fits = torch.zeros(4, w1.shape[0], dtype=torch.float64)
    names = ("up_slope", "intercept", "low", "high")
    fits[:, left] = torch.stack([site.tensors[name].double() for name in names])
    return Weights(
        w1, first.bias.detach(), w2, second.bias.detach(), *fits, left,
        site.tensors["weight"].double(), site.tensors["bias"].double(),
    )  # fmt: skip


@cache
def subject(family: str, form: str) -> Subject:
    model = Alone(own_ffn(family)).eval()
    plan = folded(model, keep=0.25, guard="exact", **FORMS[form])
    return make(family, model, plan, lambda one: one.ffn)


def assert_within_bound(one: Subject, x: Tensor) -> None:
    """Check inputs [tokens, d] in both dtypes; float64 leaves rounding little to hide behind."""
    for given_x in (x.double(), x.float()):
        error, limit = one.error(given_x).abs(), one.bound + one.allowance(given_x)
        assert bool((error <= limit).all()), (error / limit).max()


# Any input.

magnitudes = st.one_of(
    st.floats(-3, 3), st.floats(-1e-30, 1e-30), st.floats(-1e4, 1e4), st.floats(-1e34, 1e34)
)


def variations(one: Subject, x: Tensor) -> Tensor:
    """Return x [d] at several scales and, for every neuron, moved about either end of its range.

    There the guard must decide, by a predictor or not.
    """
    weights = one.weights
    z, step = weights.w1 @ x + weights.b1, weights.w1 / weights.w1.square().sum(1, keepdim=True)
    size = weights.high - weights.low
    moved = [
        x + (end + share * size - z)[:, None] * step
        for end in (weights.low, weights.high)
        for share in (-0.3, -0.03, -1e-6, 0.0, 1e-6, 0.03)
    ]
    return torch.cat([torch.stack([x, -x, 1e3 * x, 1e-3 * x, 0 * x]), *moved])


def assert_by_formula(one: Subject, x: Tensor) -> None:
    """Check that exactly the neurons in range are folded, whatever a predictor thinks of them."""
    expected, clear = one.formula(x)
    error, allowance = one.error(x), one.allowance(x)
    right = ((error - expected).abs() <= allowance).all(1)
    if one.site.details["capacity"] < int(one.weights.folded.sum()):
        right |= (error.abs() <= allowance).all(1)  # on the dense path
    assert bool(right[clear].all())


@pytest.mark.parametrize(
    ("family", "form"),
    [
        *(("bert", form) for form in FORMS),
        *((family, form) for family in ("gpt2", "opt") for form in ("true", "4 bits")),
    ],
)
@settings(max_examples=12)
@given(vector=st.lists(magnitudes, min_size=WIDTH, max_size=WIDTH))
def test_no_input_exceeds_the_bound(family: str, form: str, vector: list[float]) -> None:
    one = subject(family, form)
    x = variations(one, torch.tensor(vector, dtype=torch.float64))
    assert_within_bound(one, x)
    assert_by_formula(one, x)


# Inputs that were searched for.


def sign_attack(one: Subject, start: Tensor, steps: int = 20) -> tuple[Tensor, Tensor]:
    """Climb the compiled FFN's own error from every start [n, d], for every output and sign.

    The gradient comes from finite differences, so the attack knows nothing of plan and weights.

    Returns:
        Inputs [2 · d_out, n, d] float64, and the errors reached [d_out, …] as shares of the bound.
    """
    outputs, (count, width) = one.bound.numel(), start.shape
    output = torch.arange(outputs).repeat_interleave(2 * count)
    sign = torch.tensor([1.0, -1.0]).double().repeat_interleave(count).repeat(outputs)

    def goal(points: Tensor) -> Tensor:
        """Signed error of each input's own output: [inputs, k, d] to [inputs, k]."""
        error = one.error(points.reshape(-1, width)).view(*points.shape[:2], outputs)
        own = output[:, None, None].expand(-1, points.shape[1], 1)
        return sign[:, None] * error.gather(2, own)[..., 0]

    x = start.double().repeat(2 * outputs, 1)
    best, size = goal(x[:, None])[:, 0], torch.full((len(x), 1), 0.5, dtype=torch.float64)
    probes = 1e-3 * torch.cat([torch.eye(width), -torch.eye(width)]).double()
    for _ in range(steps):
        ahead, behind = goal(x[:, None] + probes).chunk(2, dim=1)
        candidate = x + size * (ahead - behind).sign()
        reached = goal(candidate[:, None])[:, 0]
        better = reached > best
        x, best = torch.where(better[:, None], candidate, x), torch.maximum(reached, best)
        size = torch.where(better[:, None], 1.2 * size, 0.5 * size)
    shares = (best / one.bound[output]).view(outputs, -1)
    return x, shares


@pytest.mark.parametrize("form", ["true", "4 bits"])
@pytest.mark.parametrize("family", ACTIVATIONS)
def test_a_sign_attack_stays_within_the_bound_and_comes_near(family: str, form: str) -> None:
    one = subject(family, form)
    start = rows(1, 16, seed=9)[0]
    found, shares = sign_attack(one, start)
    assert_within_bound(one, found)
    assert bool((shares.amax(1) > NEAR).all()), shares.amax(1)


@pytest.mark.parametrize("predictor", ["none", "quantized_4"])
@pytest.mark.parametrize("family", ACTIVATIONS)
def test_the_worst_input_is_as_bad_as_the_formula_says(family: str, predictor: str) -> None:
    """With fewer neurons than inputs each neuron can be put where its error is worst."""
    model = Alone(own_ffn(family, width=24, neurons=16)).eval()
    batches = [rows(seed=seed, width=24) for seed in range(3)]
    plan = folded(model, batches, keep=0, guard="exact", predictor=predictor, capacity=1.0)
    one = make(family, model, plan, lambda alone: alone.ffn)
    weights = one.weights
    inside = torch.linspace(1e-9, 1 - 1e-9, 4001, dtype=torch.float64)[:, None]
    z = weights.low + inside * (weights.high - weights.low)
    residual = weights.slope * z + weights.intercept - one.activation(z)
    shares = []
    for output in range(one.bound.numel()):
        for sign in (1.0, -1.0):
            effect = sign * weights.w2[output] * residual
            worst, where = effect.max(0)
            target = z.gather(0, where[None])[0] - weights.b1
            x = (torch.linalg.pinv(weights.w1) @ target)[None]
            error = sign * one.error(x)[0, output]
            allowance = one.allowance(x)[0, output]
            assert abs(error - worst.sum()) <= allowance
            assert error <= one.bound[output] + allowance
            shares.append(float(error / one.bound[output]))
    assert max(shares) > ATTAINED


def test_the_bound_belongs_to_these_ranges() -> None:
    """Were every neuron folded everywhere, inputs would exceed it: the guard is what holds it."""
    model = Alone(own_ffn("bert")).eval()
    plan = folded(model, keep=0.25, guard="exact")
    (site,) = plan.sites
    far = torch.full_like(site.tensors["low"], 1e6)
    unguarded = replace(site, tensors={**site.tensors, "low": -far, "high": far})
    one = make("bert", model, replace(plan, sites=(unguarded,)), lambda alone: alone.ffn)
    x = 4 * rows(seed=9).reshape(-1, WIDTH)
    assert bool((one.error(x).abs() > one.bound + one.allowance(x)).any(1).double().mean() > 0.5)
    guarded = make("bert", model, plan, lambda alone: alone.ffn)
    assert_within_bound(guarded, x)


# Models of transformers.


def gpt2_ffn(model: nn.Module) -> nn.Module:
    return model.get_submodule("transformer.h.0.mlp")


def opt_ffn(model: nn.Module) -> nn.Module:
    layer = model.get_submodule("model.decoder.layers.0")
    return nn.Sequential(layer.fc1, layer.activation_fn, layer.fc2)


def bert_ffn(model: nn.Module) -> nn.Module:
    layer = model.get_submodule("encoder.layer.0")
    return nn.Sequential(layer.intermediate, layer.output.dense)


@pytest.mark.parametrize(
    ("family", "predictor", "ffn_of"),
    [
        ("gpt2", "none", gpt2_ffn),
        ("opt", "quantized_4", opt_ffn),
        ("bert", "quantized_8", bert_ffn),
    ],
)
def test_the_ffn_of_a_transformer(
    family: str, predictor: str, ffn_of: Callable[[nn.Module], nn.Module]
) -> None:
    """Calibrated inside its model, then compiled by itself, so that it can be given any input."""
    model = tiny(family, layers=1)
    options = ffn_config(keep=0.25, guard="exact", predictor=predictor)
    plan = nbl.calibrate(model, texts(), options, progress=False)
    one = make(family, model, plan, ffn_of)
    directions = torch.randn(200, HIDDEN, generator=torch.Generator().manual_seed(4)).double()
    for scale in (1e-30, 1e-3, 0.3, 1.0, 4.0, 1e3, 1e30):
        assert_within_bound(one, scale * directions)
        assert_by_formula(one, scale * directions)
    start = directions[:2] / directions[:2].norm(dim=1, keepdim=True)
    found, shares = sign_attack(one, start, steps=12)
    assert_within_bound(one, found)
    assert float(shares.max()) > NEAR_IN_MANY_DIMENSIONS
