"""FFN moments and the fits made of them, against direct regressions on the tokens."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nbl_compiler.errors import CalibrationError
from nbl_compiler.solvers.ffn_moments import FFNMoments, KeptMoments, RegressionMoments
from nbl_compiler.solvers.ffn_regression import (
    fit_affine_map,
    fit_output,
    squared_errors,
)

# Products are taken in float32: 6e-8 relative to the product of the standard deviations.
SINGLE = {"rtol": 1e-5, "atol": 1e-5}
# Products of float64 activations are taken in float64.
DOUBLE = {"rtol": 1e-9, "atol": 1e-9}

PROPERTIES = (
    "input_mean",
    "target_mean",
    "input_covariance",
    "cross_covariance",
    "target_variance",
)


def tokens(n: int, p: int = 6, q: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated inputs, their mean far larger than their spread, and targets made of them."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, p, generator=generator, dtype=torch.float64)
    u = noise @ torch.randn(p, p, generator=generator, dtype=torch.float64) + 300
    mixing = torch.randn(p, q, generator=generator, dtype=torch.float64)
    v = torch.tanh((u - 300) @ mixing) - 70
    return u, v


def observed(u: torch.Tensor, v: torch.Tensor) -> RegressionMoments:
    moments = RegressionMoments(u.shape[1], v.shape[1])
    moments.observe(u, v)
    return moments


def assert_same(left: RegressionMoments, right: RegressionMoments, tolerance: dict) -> None:
    assert left.count == right.count
    for name in PROPERTIES:
        torch.testing.assert_close(getattr(left, name), getattr(right, name), **tolerance)


def test_moments_are_the_covariances() -> None:
    u, v = tokens(3000)
    moments = observed(u, v)
    joint = torch.cov(torch.cat([u, v], 1).T, correction=0)
    torch.testing.assert_close(moments.input_mean, u.mean(0), **DOUBLE)
    torch.testing.assert_close(moments.target_mean, v.mean(0), **DOUBLE)
    torch.testing.assert_close(moments.input_covariance, joint[:6, :6], **DOUBLE)
    torch.testing.assert_close(moments.cross_covariance, joint[6:, :6], **DOUBLE)
    torch.testing.assert_close(moments.target_variance, joint.diagonal()[6:], **DOUBLE)


def test_a_large_mean_costs_no_digits_in_single_precision() -> None:
    u, v = tokens(5000)
    u, v = u.float(), v.float()
    assert_same(observed(u, v), observed(u.double(), v.double()), SINGLE)


@settings(deadline=None)
@given(cuts=st.lists(st.integers(0, 300), max_size=6), seed=st.integers(0, 20))
def test_the_cut_of_the_stream_does_not_matter(cuts: list[int], seed: int) -> None:
    u, v = tokens(300, seed=seed)
    pieces = RegressionMoments(6, 4)
    for start, stop in itertools.pairwise([0, *sorted(cuts), 300]):
        pieces.observe(u[start:stop], v[start:stop])
    assert_same(pieces, observed(u, v), DOUBLE)


@settings(deadline=None)
@given(cuts=st.tuples(st.integers(0, 300), st.integers(0, 300)), seed=st.integers(0, 20))
def test_merge_commutes_and_associates(cuts: tuple[int, int], seed: int) -> None:
    u, v = tokens(300, seed=seed)
    first, second = sorted(cuts)
    a, b, c = (
        observed(u[part], v[part])
        for part in (slice(first), slice(first, second), slice(second, None))
    )
    if a.count + b.count:
        assert_same(a.merge(b), b.merge(a), DOUBLE)
    assert_same(a.merge(b).merge(c), a.merge(b.merge(c)), DOUBLE)
    assert_same(a.merge(b).merge(c), observed(u, v), DOUBLE)


def test_merge_leaves_its_operands_alone() -> None:
    u, v = tokens(200)
    a, b = observed(u[:80], v[:80]), observed(u[80:], v[80:])
    a.merge(b).observe(2 * u, v)
    assert_same(a, observed(u[:80], v[:80]), {"rtol": 0, "atol": 0})
    assert_same(b, observed(u[80:], v[80:]), {"rtol": 0, "atol": 0})


@pytest.mark.parametrize("where", ["inputs", "outputs"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_activations_are_refused_and_leave_no_trace(where: str, bad: float) -> None:
    u, v = tokens(50)
    moments = RegressionMoments(6, 4, name="model.layers.2.mlp")
    moments.observe(u, v)
    before = observed(u, v)
    (u if where == "inputs" else v)[3, 1] = bad
    with pytest.raises(CalibrationError, match=rf"model\.layers\.2\.mlp: NaN or infinite {where}"):
        moments.observe(u, v)
    assert_same(moments, before, {"rtol": 0, "atol": 0})


def test_misuse() -> None:
    u, v = tokens(10)
    with pytest.raises(ValueError, match="10 input tokens but 9 target tokens"):
        RegressionMoments(6, 4).observe(u, v[:9])
    with pytest.raises(ValueError, match="same inputs and targets"):
        RegressionMoments(6, 4).merge(RegressionMoments(6, 5))
    with pytest.raises(CalibrationError, match=r"h\.0\.mlp: no calibration token"):
        _ = FFNMoments(6, 4, name="h.0.mlp").input_mean


def test_kept_moments_select_their_neurons() -> None:
    x, hidden = tokens(400, p=5, q=9)
    y = hidden @ torch.randn(9, 3, dtype=torch.float64)
    kept = torch.tensor([1, 4, 8])
    moments = KeptMoments(5, kept, 3)
    for part in (slice(150), slice(150, None)):
        moments.observe_ffn(x[part].reshape(-1, 1, 5), hidden[part].reshape(-1, 1, 9), y[part])
    assert_same(moments, observed(torch.cat([x, hidden[:, kept]], 1), y), DOUBLE)
    merged = moments.merge(moments)
    assert isinstance(merged, KeptMoments)
    assert merged.model_size == 5
    with pytest.raises(ValueError, match="same kept neurons"):
        moments.merge(KeptMoments(5, kept + 1, 3))


def test_the_fit_is_the_regression_and_its_errors_are_real() -> None:
    (u, v), (held_u, held_v) = tokens(2000), tokens(500, seed=0)
    held_u, held_v = held_u + 0.3, held_v * 1.1
    train, held = observed(u, v), observed(held_u, held_v)
    fit = fit_affine_map(train, held, ridge=0.0)
    design = torch.cat([u - 300, torch.ones(2000, 1, dtype=torch.float64)], 1)
    solution = torch.linalg.lstsq(design, v).solution
    torch.testing.assert_close(fit.weight, solution[:6].T, rtol=1e-6, atol=1e-8)
    residual = v - u @ fit.weight.T - fit.bias
    torch.testing.assert_close(fit.residual, residual.square().mean(0), rtol=1e-6, atol=1e-9)
    held_residual = (held_v - held_u @ fit.weight.T - fit.bias).square().mean(0)
    torch.testing.assert_close(squared_errors(held, fit.weight, fit.bias), held_residual)
    expected = float(held_residual.sum() / held_v.var(0, correction=0).sum())
    assert fit.holdout_nmse == pytest.approx(expected, rel=1e-6)
    errors = squared_errors(train, fit.weight, fit.bias).sum()
    assert float(errors / train.target_variance.sum()) == pytest.approx(fit.nmse)


def test_an_exactly_linear_target_is_recovered_whatever_the_prior() -> None:
    u, _ = tokens(500)
    weight, bias = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    moments = observed(u, u @ weight.T + bias)
    for prior in (None, torch.randn(3, 6, dtype=torch.float64)):
        fit = fit_affine_map(moments, ridge=0.0, prior=prior)
        torch.testing.assert_close(fit.weight, weight, rtol=1e-6, atol=1e-7)
        assert fit.nmse < 1e-10


def test_the_ridge_shrinks_towards_the_prior() -> None:
    u, v = tokens(500)
    prior = torch.randn(4, 6, dtype=torch.float64)
    moments = observed(u, v)
    distances = [
        float((fit_affine_map(moments, ridge=ridge, prior=prior).weight - prior).norm())
        for ridge in (1e-3, 1.0, 1e3, 1e9)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-6


def test_only_free_columns_leave_the_prior() -> None:
    u, v = tokens(500)
    prior = torch.randn(4, 6, dtype=torch.float64)
    fit = fit_affine_map(observed(u, v), ridge=0.0, prior=prior, free=2)
    assert torch.equal(fit.weight[:, 2:], prior[:, 2:])
    rest = fit_affine_map(observed(u[:, :2], v - u[:, 2:] @ prior[:, 2:].T), ridge=0.0)
    torch.testing.assert_close(fit.weight[:, :2], rest.weight, rtol=1e-6, atol=1e-7)


def test_fewer_tokens_than_inputs_and_dead_inputs_are_harmless() -> None:
    u, v = tokens(4)
    u[:, 2] = 7.0
    fit = fit_affine_map(observed(u, v), ridge=0.0)
    assert bool(fit.weight.isfinite().all())
    assert float(fit.weight[:, 2].abs().max()) == 0
    torch.testing.assert_close(u @ fit.weight.T + fit.bias, v, rtol=1e-6, atol=1e-6)


def test_auto_ridge_is_the_best_of_its_candidates_on_held_out_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(60, 30, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 30, generator=generator, dtype=torch.float64)
    v = u @ weight.T + 8 * torch.randn(60, 4, generator=generator, dtype=torch.float64)
    train, held = observed(u[:40], v[:40]), observed(u, v)
    importance = torch.tensor([1.0, 5.0, 0.1, 2.0])
    auto = fit_affine_map(train, held, output_weights=importance)
    assert auto.ridge > 0
    for ridge in (0.0, 1e-3, 0.1, 1.0):
        other = fit_affine_map(train, held, ridge=ridge, output_weights=importance)
        assert auto.holdout_nmse <= other.holdout_nmse + 1e-12


def test_without_held_out_tokens_the_error_is_nan_and_the_ridge_the_default() -> None:
    fit = fit_affine_map(observed(*tokens(100)))
    assert math.isnan(fit.holdout_nmse)
    assert fit.ridge == pytest.approx(1e-2)


def test_joint_refit_is_at_least_as_good_as_keeping_the_columns() -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(3000, 8, generator=generator, dtype=torch.float64)
    hidden = torch.relu(x @ torch.randn(8, 40, generator=generator, dtype=torch.float64))
    w2 = torch.randn(5, 40, generator=generator, dtype=torch.float64)
    kept = torch.arange(10)
    moments = KeptMoments(8, kept, 5)
    moments.observe_ffn(x, hidden, hidden @ w2.T)
    fixed = fit_output(moments, w2[:, kept], refit=False, ridge=0.0)
    joint = fit_output(moments, w2[:, kept], refit=True, ridge=0.0)
    assert torch.equal(fixed.weight[:, 8:], w2[:, kept])
    assert joint.nmse < fixed.nmse
