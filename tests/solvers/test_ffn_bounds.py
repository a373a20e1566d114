"""Adversarial inputs against the certified error of a folded FFN with exact corrections."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from helpers.rounding_slack import rounding_slack
from hypothesis import given, settings
from hypothesis import strategies as st

from nbl_compiler.solvers.activation_errors import affine_residual_extremes
from nbl_compiler.solvers.activations import ACTIVATION_NAMES, activation
from nbl_compiler.solvers.affine_fit import AffineFit, minimax_affine
from nbl_compiler.solvers.ffn_bounds import folded_bound
from nbl_compiler.solvers.folding import FFNWeights, dense_ffn, fold_affine

MODEL, HIDDEN, OUTPUT = 8, 24, 6
# Attaining the bound: rounding of pre-activations that were solved for.
ATTAINED = 1e-8

every_activation = pytest.mark.parametrize("name", ACTIVATION_NAMES)


def ffn(name: str, seed: int = 0, scale: float = 1.0) -> FFNWeights:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    return FFNWeights(
        name, normal(HIDDEN, MODEL), normal(OUTPUT, HIDDEN), normal(HIDDEN), normal(OUTPUT)
    )


@cache
def fits(name: str, seed: int = 0) -> AffineFit:
    """Random ranges, and the fits whose bound leaves an adversary the least room."""
    generator = torch.Generator().manual_seed(100 + seed)
    ends = 3 * torch.randn(2, HIDDEN, generator=generator, dtype=torch.float64)
    return minimax_affine(activation(name), ends.amin(0), ends.amax(0))


def guarded(
    weights: FFNWeights,
    fit: AffineFit,
    x: torch.Tensor,
    outside: torch.Tensor | None = None,
) -> torch.Tensor:
    """The folded FFN with exact corrections, computed in the dtype of ``x``."""
    matrix, bias = fold_affine(weights, fit)
    w1, w2, b1, matrix, bias, slope, intercept = (
        tensor.to(x.dtype)
        for tensor in (weights.w1, weights.w2, weights.b1, matrix, bias, fit.slope, fit.intercept)
    )
    z = torch.nn.functional.linear(x, w1, b1)
    if outside is None:
        outside = (z < fit.lo) | (z > fit.hi)
    residual = activation(weights.activation)(z) - slope * z - intercept
    return x @ matrix.T + bias + (residual * outside) @ w2.T


def cast(weights: FFNWeights, dtype: torch.dtype) -> FFNWeights:
    return replace(
        weights,
        **{name: getattr(weights, name).to(dtype) for name in ("w1", "w2", "b1", "b2")},
    )


magnitudes = st.one_of(st.floats(-3, 3), st.floats(-1e-8, 1e-8), st.floats(-1e4, 1e4))
vectors = st.lists(magnitudes, min_size=MODEL, max_size=MODEL)


@every_activation
@settings(deadline=None)
@given(vector=vectors, seed=st.integers(0, 2))
def test_no_input_exceeds_the_bound(name: str, vector: list[float], seed: int) -> None:
    weights, fit = ffn(name, seed), fits(name, seed)
    x = torch.tensor([vector], dtype=torch.float64)
    bound = folded_bound(weights.w2, fit.max_error) + rounding_slack(
        weights, fit, x.norm(dim=-1), torch.float64
    )
    error = (guarded(weights, fit, x) - dense_ffn(weights, x)).abs()
    assert bool((error <= bound).all())


@every_activation
@settings(deadline=None)
@given(neuron=st.integers(0, HIDDEN - 1), which=st.integers(0, 9), seed=st.integers(0, 2))
def test_inputs_aimed_at_endpoints_and_roots(name: str, neuron: int, which: int, seed: int) -> None:
    """x is solved for so that one neuron sits exactly where its error is greatest, or at an end."""
    weights, fit = ffn(name, seed), fits(name, seed)
    extremes = affine_residual_extremes(activation(name), fit.lo, fit.hi, fit.slope)
    infinity = torch.tensor(torch.inf, dtype=torch.float64)
    targets = [extremes.lowest_at, extremes.highest_at, fit.lo, fit.hi]
    targets += [torch.nextafter(t, side) for t in targets[2:] for side in (infinity, -infinity)]
    targets += [(fit.lo + fit.hi) / 2, torch.zeros_like(fit.lo)]
    row = weights.w1[neuron]
    target = targets[which][neuron] - weights.b1[neuron]
    x = (target * row / row.square().sum())[None]
    bound = folded_bound(weights.w2, fit.max_error) + rounding_slack(
        weights, fit, x.norm(dim=-1), torch.float64
    )
    error = (guarded(weights, fit, x) - dense_ffn(weights, x)).abs()
    assert bool((error <= bound).all())


@every_activation
def test_the_bound_is_attained(name: str) -> None:
    """With as many inputs as neurons every neuron can sit at its worst, its sign adding up."""
    generator = torch.Generator().manual_seed(0)
    f = 6
    w1 = torch.eye(f, dtype=torch.float64)
    w2 = torch.randn(1, f, generator=generator, dtype=torch.float64)
    ends = torch.randn(2, f, generator=generator, dtype=torch.float64) * 3
    fit = minimax_affine(activation(name), ends.amin(0), ends.amax(0))
    weights = FFNWeights(name, w1, w2, torch.zeros(f).double(), torch.zeros(1).double())
    extremes = affine_residual_extremes(activation(name), fit.lo, fit.hi, fit.slope)
    x = torch.where(w2[0] > 0, extremes.highest_at, extremes.lowest_at)[None]
    error = (guarded(weights, fit, x) - dense_ffn(weights, x)).abs()[0]
    bound = folded_bound(weights.w2, fit.max_error)
    torch.testing.assert_close(error, bound, rtol=0, atol=ATTAINED)


@every_activation
@settings(deadline=None)
@given(vector=vectors, seed=st.integers(0, 2), scale=st.sampled_from([1e-3, 1.0, 30.0]))
def test_rounding_slack_covers_single_precision(
    name: str, vector: list[float], seed: int, scale: float
) -> None:
    weights, fit = cast(ffn(name, seed, scale), torch.float32), fits(name, seed)
    x = torch.tensor([vector], dtype=torch.float32)
    slack = rounding_slack(weights, fit, x.double().norm(dim=-1), torch.float32)
    bound = folded_bound(weights.w2, fit.max_error) + slack
    error = (guarded(weights, fit, x).double() - dense_ffn(weights, x).double()).abs()
    assert bool((error <= bound).all())


def test_rounding_slack_is_small_for_ordinary_inputs() -> None:
    weights, fit = ffn("gelu"), fits("gelu")
    slack = rounding_slack(weights, fit, torch.tensor([1.0, 3.0]).double(), torch.float32)
    assert slack.shape == (2, OUTPUT)
    assert bool((slack < 1e-2 * folded_bound(weights.w2, fit.max_error)).all())


def test_only_folded_neurons_count() -> None:
    weights, fit = ffn("gelu"), fits("gelu")
    folded = torch.arange(4, HIDDEN)
    expected = weights.w2[:, 4:].abs() @ fit.max_error[4:]
    bound = folded_bound(weights.select(folded).w2, fit.max_error[4:])
    torch.testing.assert_close(bound, expected)
    nothing = weights.select(folded[:0])
    assert not bool(folded_bound(nothing.w2, fit.max_error[:0]).any())
