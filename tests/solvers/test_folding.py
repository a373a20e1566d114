"""Folding: the folded form equals what it stands for; keep and correct give back the dense FFN."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers.kept_folds import keep_and_fold, kept_fold_ffn
from hypothesis import given, settings
from hypothesis import strategies as st

from nbl_compiler.solvers.activations import ACTIVATION_NAMES, activation
from nbl_compiler.solvers.affine_fit import AffineFit, minimax_affine
from nbl_compiler.solvers.ffn_moments import FFNMoments, KeptMoments
from nbl_compiler.solvers.ffn_regression import fit_affine_map, fit_output, squared_errors
from nbl_compiler.solvers.folding import (
    FFNWeights,
    affine_hidden,
    dense_ffn,
    fold_affine,
    fold_hidden,
    hidden_product,
    kept_count,
    neuron_scores,
    select_kept,
)

# The same sums of products in float64, in another order.
ROUNDING = {"rtol": 1e-10, "atol": 1e-10}
MODEL, HIDDEN, OUTPUT = 6, 20, 5

every_activation = pytest.mark.parametrize("name", ACTIVATION_NAMES)
plain_and_gated = pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
with_and_without_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])


def ffn(name: str = "gelu", *, gated: bool = False, bias: bool = True, seed: int = 0) -> FFNWeights:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return FFNWeights(
        activation=name,
        w1=normal(HIDDEN, MODEL),
        w2=normal(OUTPUT, HIDDEN),
        b1=normal(HIDDEN) if bias else None,
        b2=normal(OUTPUT) if bias else None,
        w_up=normal(HIDDEN, MODEL) if gated else None,
        b_up=normal(HIDDEN) if gated and bias else None,
    )


def inputs(tokens: int = 50, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, MODEL, generator=generator, dtype=torch.float64)


def fit_on(weights: FFNWeights, lo: float, hi: float) -> AffineFit:
    ones = torch.ones(HIDDEN, dtype=torch.float64)
    return minimax_affine(activation(weights.activation), lo * ones, hi * ones)


def guarded(weights: FFNWeights, fit: AffineFit, x: torch.Tensor) -> torch.Tensor:
    """Folded output plus the exact correction of every neuron out of its range (TARDIS)."""
    matrix, bias = fold_affine(weights, fit)
    z = torch.nn.functional.linear(x, weights.w1, weights.b1)
    outside = (z < fit.lo) | (z > fit.hi)
    residual = activation(weights.activation)(z) - fit.slope * z - fit.intercept
    return x @ matrix.T + bias + (residual * outside) @ weights.w2.T


@every_activation
@with_and_without_bias
def test_in_range_the_fold_is_the_affine_form(name: str, bias: bool) -> None:
    weights, x = ffn(name, bias=bias), inputs()
    fit = fit_on(weights, -100.0, 100.0)
    z = torch.nn.functional.linear(x, weights.w1, weights.b1)
    affine = (fit.slope * z + fit.intercept) @ weights.w2.T
    expected = affine if weights.b2 is None else affine + weights.b2
    matrix, offset = fold_affine(weights, fit)
    torch.testing.assert_close(x @ matrix.T + offset, expected, **ROUNDING)
    torch.testing.assert_close(guarded(weights, fit, x), expected, **ROUNDING)


@pytest.mark.parametrize(
    ("name", "side"),
    [(name, side) for name in ACTIVATION_NAMES for side in (-1, 1) if (name, side) != ("relu2", 1)],
)
def test_where_the_activation_is_affine_folding_loses_nothing(name: str, side: int) -> None:
    """In its tails σ is 0 or z; there folded equals dense."""
    weights, x = ffn(name), inputs()
    weights = replace(weights, b1=torch.full((HIDDEN,), side * 300.0, dtype=torch.float64))
    ends = sorted((side * 100.0, side * 500.0))
    matrix, bias = fold_affine(weights, fit_on(weights, *ends))
    torch.testing.assert_close(x @ matrix.T + bias, dense_ffn(weights, x), rtol=1e-9, atol=1e-8)


@every_activation
def test_all_outside_corrected_is_the_dense_ffn(name: str) -> None:
    weights, x = ffn(name), inputs()
    fit = fit_on(weights, 1000.0, 1001.0)
    torch.testing.assert_close(
        guarded(weights, fit, x), dense_ffn(weights, x), rtol=1e-9, atol=1e-7
    )


@every_activation
@plain_and_gated
@with_and_without_bias
def test_keeping_everything_is_the_dense_ffn(name: str, gated: bool, bias: bool) -> None:
    weights, x = ffn(name, gated=gated, bias=bias), inputs()
    kept, folded = select_kept(torch.rand(HIDDEN), kept_count(HIDDEN, 1.0))
    assert folded.numel() == 0
    matrix, offset = fold_hidden(
        weights, torch.zeros(HIDDEN, MODEL), torch.zeros(HIDDEN), neurons=folded
    )
    rewritten = keep_and_fold(weights, kept, matrix, offset)
    assert rewritten.matrix is None
    torch.testing.assert_close(kept_fold_ffn(rewritten, x), dense_ffn(weights, x), rtol=0, atol=0)


@plain_and_gated
def test_kept_neurons_plus_fold_is_the_sum_of_its_parts(gated: bool) -> None:
    weights, x = ffn("silu", gated=gated), inputs()
    h, c = torch.randn(HIDDEN, MODEL, dtype=torch.float64), torch.randn(HIDDEN).double()
    kept = torch.tensor([1, 5, 6, 19])
    folded = torch.tensor([i for i in range(HIDDEN) if i not in kept.tolist()])
    rewritten = keep_and_fold(weights, kept, *fold_hidden(weights, h, c, folded))
    hidden = x @ h.T + c
    hidden[:, kept] = hidden_product(weights, x)[:, kept]
    expected = hidden @ weights.w2.T + weights.b2
    torch.testing.assert_close(kept_fold_ffn(rewritten, x), expected, **ROUNDING)
    assert rewritten.weights.w1.shape == (4, MODEL)
    assert rewritten.weights.w2.shape == (OUTPUT, 4)
    assert (rewritten.weights.w_up is not None) == gated


@plain_and_gated
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
def test_non_finite_inputs_stay_visible(gated: bool, bad: float, keep: float) -> None:
    weights, x = ffn("gelu", gated=gated), inputs(3)
    x[1, 2] = bad
    kept, folded = select_kept(torch.rand(HIDDEN), kept_count(HIDDEN, keep))
    h, c = torch.randn(HIDDEN, MODEL, dtype=torch.float64), torch.randn(HIDDEN).double()
    rewritten = keep_and_fold(weights, kept, *fold_hidden(weights, h, c, folded))
    result, dense = kept_fold_ffn(rewritten, x), dense_ffn(weights, x)
    assert not bool(dense[1].isfinite().any())
    assert not bool(result[1].isfinite().any())
    assert bool(result[[0, 2]].isfinite().all())


@pytest.mark.parametrize("shape", [(0,), (1,), (2, 3), (4, 0, 2)])
def test_any_batch_shape(shape: tuple[int, ...]) -> None:
    weights = ffn("relu")
    h, c = torch.zeros(HIDDEN, MODEL), torch.zeros(HIDDEN)
    kept, folded = select_kept(torch.rand(HIDDEN), 7)
    rewritten = keep_and_fold(weights, kept, *fold_hidden(weights, h, c, folded))
    x = torch.randn(*shape, MODEL, dtype=torch.float64)
    assert kept_fold_ffn(rewritten, x).shape == (*shape, OUTPUT)


def calibrated(weights: FFNWeights, x: torch.Tensor) -> FFNMoments:
    moments = FFNMoments(MODEL, HIDDEN)
    moments.observe(x, hidden_product(weights, x))
    return moments


@every_activation
def test_lmmse_is_never_worse_than_the_affine_activation(name: str) -> None:
    """Both are affine in x; the LMMSE is the best such map for every neuron."""
    weights, x = ffn(name), inputs(4000)
    moments = calibrated(weights, x)
    lmmse = fit_affine_map(moments, ridge=0.0)
    weight, bias = affine_hidden(weights, fit_on(weights, -3.0, 3.0))
    affine = squared_errors(moments, weight, bias)
    direct = (hidden_product(weights, x) - x @ weight.T - bias).square().mean(0)
    torch.testing.assert_close(affine, direct, rtol=1e-6, atol=1e-9)
    assert bool((lmmse.residual <= affine + 1e-9).all())


@plain_and_gated
def test_folding_neuron_fits_is_fitting_the_output(gated: bool) -> None:
    """Regression is linear in its target: W2 · LMMSE(z) = LMMSE(W2 z), for the same ridge."""
    weights, x = ffn("silu", gated=gated), inputs(3000)
    neuron_fit = fit_affine_map(calibrated(weights, x), ridge=0.01)
    kept, folded = select_kept(neuron_scores(neuron_fit.residual, weights.w2), 6)
    matrix, bias = fold_hidden(weights, neuron_fit.weight, neuron_fit.bias, folded)
    output = KeptMoments(MODEL, kept, OUTPUT)
    output.observe_ffn(x, hidden_product(weights, x), dense_ffn(weights, x))
    fit = fit_output(output, weights.w2[:, kept], refit=False, ridge=0.01)
    torch.testing.assert_close(fit.weight[:, :MODEL], matrix, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(fit.bias, bias, rtol=1e-7, atol=1e-8)
    rewritten = keep_and_fold(weights, kept, matrix, bias)
    dense = dense_ffn(weights, x)
    error = (kept_fold_ffn(rewritten, x) - dense).square().mean(0).sum()
    nmse = float(error / dense.var(0, correction=0).sum())
    assert fit.nmse == pytest.approx(nmse, rel=1e-6)
    errors = squared_errors(output, fit.weight, fit.bias).sum()
    assert float(errors / output.target_variance.sum()) == pytest.approx(nmse, rel=1e-6)


def test_keeping_more_neurons_never_hurts_in_training() -> None:
    weights, x = ffn("gelu", gated=True), inputs(4000)
    scores = neuron_scores(fit_affine_map(calibrated(weights, x), ridge=0.0).residual, weights.w2)
    errors = []
    for count in (0, 4, 10, 16, 20):
        kept, _ = select_kept(scores, count)
        moments = KeptMoments(MODEL, kept, OUTPUT)
        moments.observe_ffn(x, hidden_product(weights, x), dense_ffn(weights, x))
        errors.append(fit_output(moments, weights.w2[:, kept], ridge=0.0).nmse)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-9


def test_a_linear_neuron_is_folded_first() -> None:
    """ReLU neurons that are always on (or off) have no residual and are never kept."""
    weights = ffn("relu")
    bias = weights.b1.clone()
    bias[:8], bias[8:12] = 1e3, -1e3
    weights = replace(weights, b1=bias)
    residual = fit_affine_map(calibrated(weights, inputs(2000)), ridge=0.0).residual
    kept, folded = select_kept(neuron_scores(residual, weights.w2), 8)
    assert kept.tolist() == list(range(12, 20))
    assert folded.tolist() == list(range(12))


def test_refitted_columns_replace_the_original_ones() -> None:
    weights, kept = ffn(), torch.tensor([0, 3])
    columns = torch.randn(OUTPUT, 2, dtype=torch.float64)
    matrix, bias = torch.zeros(OUTPUT, MODEL), torch.zeros(OUTPUT)
    rewritten = keep_and_fold(weights, kept, matrix, bias, columns)
    assert torch.equal(rewritten.weights.w2, columns)


@settings(deadline=None)
@given(neurons=st.integers(1, 5000), keep=st.floats(0, 1), multiple=st.sampled_from([1, 8, 32]))
def test_kept_count(neurons: int, keep: float, multiple: int) -> None:
    count = kept_count(neurons, keep, multiple)
    assert count == neurons or count % multiple == 0
    assert keep * neurons - 1e-3 <= count <= neurons
    assert count < keep * neurons + multiple + 1e-3


def test_kept_count_of_exact_fractions() -> None:
    assert kept_count(100, 0.07) == 7
    assert kept_count(100, 0.0) == 0
    assert kept_count(100, 0.071) == 8


@pytest.mark.parametrize("keep", [-0.1, 1.1, math.nan])
def test_keep_out_of_range(keep: float) -> None:
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        kept_count(100, keep)


def test_gated_neurons_have_no_affine_activation() -> None:
    weights = ffn("silu", gated=True)
    with pytest.raises(ValueError, match="plain FFNs only"):
        fold_affine(weights, fit_on(weights, -1.0, 1.0))
