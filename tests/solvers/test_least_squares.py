"""The linear map: exact where the data are, sensible where they do not determine it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nbl_compiler.solvers.least_squares import MIN_HOLDOUT_ROWS, RIDGES, LinearFit, fit_linear
from nbl_compiler.solvers.moments import Moments

# Products of float32 rows carry 2⁻²⁴ each; a fit inherits that times a modest condition number.
RECOVERY_TOLERANCE = 2e-5
# An NMSE is a difference of such sums, relative to the variance.
NMSE_TOLERANCE = 1e-5

seeds = st.integers(0, 10_000)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments(x: Tensor, y: Tensor) -> Moments:
    result = Moments.zeros(x.shape[1], y.shape[1])
    result.add(x, y, torch.zeros_like(y))
    return result


def jitter(value: float, rows: int) -> Tensor:
    """A constant as a computation delivers it: off by one unit in the last place now and then."""
    constant = torch.full((rows,), value)
    other = constant if value == 0 else torch.nextafter(constant, torch.tensor(float("inf")))
    return torch.where(draw(9, rows) > 0, constant, other)


def predict(fit: LinearFit, x: Tensor) -> Tensor:
    return x.double() @ fit.weight.T + fit.bias


def nmse(fit: LinearFit, x: Tensor, y: Tensor) -> float:
    y = y.double()
    error = (y - predict(fit, x)).square().sum()
    return float(error / (y - y.mean(0)).square().sum())


@given(seeds, st.integers(1, 12), st.integers(1, 6), st.sampled_from([0.0, "auto"]))
def test_a_linear_map_is_recovered(
    seed: int, inputs: int, outputs: int, ridge: float | str
) -> None:
    x = draw(seed, 400, inputs)
    weight, bias = draw(seed + 1, outputs, inputs), draw(seed + 2, outputs)
    y = x @ weight.T + bias
    fit = fit_linear(moments(x[:300], y[:300]), moments(x[300:], y[300:]), ridge)
    atol = RECOVERY_TOLERANCE * max(1.0, float(weight.abs().max()))
    torch.testing.assert_close(fit.weight, weight.double(), rtol=0, atol=atol)
    torch.testing.assert_close(fit.bias, bias.double(), rtol=0, atol=atol)
    assert fit.rank == inputs
    assert fit.nmse < NMSE_TOLERANCE
    assert fit.holdout_nmse < NMSE_TOLERANCE


@given(seeds)
def test_the_fit_without_ridge_is_ordinary_least_squares(seed: int) -> None:
    x, noise = draw(seed, 500, 8), draw(seed + 1, 500, 3)
    y = torch.tanh(x @ draw(seed + 2, 8, 3)) + 0.1 * noise
    fit = fit_linear(moments(x, y), ridge=0.0)
    design = torch.cat([x, torch.ones(500, 1)], dim=1).double()
    expected = torch.linalg.lstsq(design, y.double()).solution
    torch.testing.assert_close(fit.weight, expected[:-1].T, rtol=0, atol=RECOVERY_TOLERANCE)
    torch.testing.assert_close(fit.bias, expected[-1], rtol=0, atol=RECOVERY_TOLERANCE)
    assert fit.nmse == pytest.approx(nmse(fit, x, y), abs=NMSE_TOLERANCE)


@given(seeds, st.sampled_from([1e-4, 0.1, 10.0]))
def test_a_given_ridge_is_relative_to_each_variance(seed: int, ridge: float) -> None:
    scale = torch.tensor([1e-3, 1.0, 1e3, 5.0])
    x = draw(seed, 300, 4) * scale
    y = x / scale @ draw(seed + 1, 4, 2)
    own = moments(x, y)
    fit = fit_linear(own, ridge=ridge)
    xc, yc = x.double() - own.mean_x, y.double() - own.mean_y
    covariance = xc.T @ xc / 300
    expected = torch.linalg.solve(
        covariance + ridge * torch.diag(covariance.diagonal()), xc.T @ yc / 300
    ).T
    scaled = torch.diag(scale.double())  # compare in units in which all inputs weigh the same
    torch.testing.assert_close(
        fit.weight @ scaled, expected @ scaled, rtol=0, atol=RECOVERY_TOLERANCE
    )
    assert fit.ridge == ridge


@given(seeds)
def test_features_of_very_different_scales(seed: int) -> None:
    scale = 10.0 ** torch.linspace(-3, 3, 10)
    x = draw(seed, 600, 10) * scale + 2 * scale
    weight = draw(seed + 1, 3, 10) / scale
    y = x @ weight.T
    fit = fit_linear(moments(x, y), ridge=0.0)
    torch.testing.assert_close(
        fit.weight * scale, (weight * scale).double(), rtol=0, atol=10 * RECOVERY_TOLERANCE
    )


@pytest.mark.parametrize("ridge", [0.0, 1e-3, "auto"])
@pytest.mark.parametrize("rows", [17, 40])
def test_fewer_rows_than_dimensions(rows: int, ridge: float | str) -> None:
    """Many maps fit; the one chosen is the smallest, and so generalises as far as it can."""
    x, weight = draw(0, rows, 64), draw(1, 5, 64) / 8
    y = x @ weight.T
    fit = fit_linear(moments(x, y), ridge=ridge)
    assert torch.isfinite(fit.weight).all()
    assert torch.isfinite(fit.bias).all()
    assert fit.rank == rows - 1
    # The smallest interpolating map is the true one projected on what the rows span.
    assert fit.weight.norm() <= weight.norm() * 1.1
    fresh = draw(2, 1000, 64)
    assert nmse(fit, fresh, fresh @ weight.T) < 1.1
    if ridge == 0.0:
        assert nmse(fit, x, y) < NMSE_TOLERANCE
        assert fit.holdout_nmse == math.inf  # rows say nothing about a map that interpolates them


def test_the_null_direction_of_a_layer_norm_is_left_out() -> None:
    """What LayerNorm puts out lies in a hyperplane; rounding across it is no data."""
    gain = draw(0, 48) * 0.3 + 1
    x = torch.nn.functional.layer_norm(draw(1, 3000, 48), (48,)) * gain
    y = torch.tanh(x @ draw(2, 48, 7))
    fit = fit_linear(moments(x, y), ridge=0.0)
    assert fit.rank == 47
    # The smallest map, in units of each input's deviation, ignores the direction Σ x_i / gain_i.
    ignored = torch.nn.functional.normalize(x.var(0) / gain, dim=0).double()
    assert (fit.weight @ ignored).abs().max() < RECOVERY_TOLERANCE * fit.weight.norm()


@pytest.mark.parametrize("value", [0.0, 3.0, -1e4])
@pytest.mark.parametrize("ridge", [0.0, "auto"])
def test_inputs_that_never_vary_get_no_weight(value: float, ridge: float | str) -> None:
    x, weight = draw(0, 2500, 6), draw(1, 4, 6)
    weight[:, 2] = 0
    y = x @ weight.T
    x[:, 2] = jitter(value, 2500)
    fit = fit_linear(moments(x[:2000], y[:2000]), moments(x[2000:], y[2000:]), ridge)
    assert fit.rank == 5
    assert (fit.weight[:, 2] == 0).all()
    assert nmse(fit, x, y) < NMSE_TOLERANCE


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
@pytest.mark.parametrize("held_out", [True, False])
def test_an_output_that_never_varies_is_reproduced(value: float, held_out: bool) -> None:
    x, y = draw(0, 300, 6), jitter(value, 300)[:, None].expand(-1, 3)
    holdout = moments(x[200:], y[200:]) if held_out else None
    fit = fit_linear(moments(x[:200], y[:200]), holdout)
    assert fit.nmse == fit.holdout_nmse == 0.0
    # Single-precision rounding of the constant.
    torch.testing.assert_close(predict(fit, x), y.double(), rtol=1e-6, atol=0)


def test_identical_rows() -> None:
    x, y = torch.ones(100, 4), torch.ones(100, 2)
    fit = fit_linear(moments(x, y), moments(x, y))
    assert fit.rank == 0
    torch.testing.assert_close(predict(fit, x), y.double())


@given(seeds, st.sampled_from([0.0, 1e-2, "auto"]), st.integers(40, 200))
def test_the_held_out_error_is_that_of_the_rows(seed: int, ridge: float | str, rows: int) -> None:
    x, mix = draw(seed, 300 + rows, 10) + 2, draw(seed + 1, 10, 4)
    y = torch.sin(x @ mix) + 3
    holdout = moments(x[300:], y[300:])
    fit = fit_linear(moments(x[:300], y[:300]), holdout, ridge)
    assert fit.holdout_nmse == pytest.approx(nmse(fit, x[300:], y[300:]), abs=NMSE_TOLERANCE)
    assert fit.nmse == pytest.approx(nmse(fit, x[:300], y[:300]), abs=NMSE_TOLERANCE)


@given(seeds)
def test_auto_takes_the_ridge_with_the_least_held_out_error(seed: int) -> None:
    x = draw(seed, 160, 40)
    y = x @ draw(seed + 1, 40, 3) + 20 * draw(seed + 2, 160, 3)  # mostly noise: shrink
    train, holdout = moments(x[:80], y[:80]), moments(x[80:], y[80:])
    best = fit_linear(train, holdout)
    errors = {ridge: fit_linear(train, holdout, ridge).holdout_nmse for ridge in RIDGES}
    assert best.ridge == min(errors, key=errors.__getitem__)
    assert best.holdout_nmse == min(errors.values())


@pytest.mark.parametrize("held_out", [0, MIN_HOLDOUT_ROWS - 1])
def test_cross_validation_stands_in_for_too_few_held_out_rows(held_out: int) -> None:
    x = draw(0, 100 + held_out, 30)
    y = x @ draw(1, 30, 4) + 2 * draw(2, 100 + held_out, 4)
    train, holdout = moments(x[:100], y[:100]), moments(x[100:], y[100:])
    fit = fit_linear(train, holdout)
    assert fit.ridge == fit_linear(train).ridge
    assert fit.holdout_nmse == fit_linear(train).holdout_nmse
    # GCV(ρ) = (RSS / n) / (1 − trace(H) / n)², computed here on the rows (Golub et al. 1979).
    xc = (x[:100] - x[:100].mean(0)).double()
    scaled = xc / xc.square().mean(0).sqrt()
    values = torch.linalg.eigvalsh(scaled.T @ scaled / 100)
    freedom = 1 + float((values / (values + fit.ridge)).sum())
    expected = nmse(fit, x[:100], y[:100]) / (1 - freedom / 100) ** 2
    assert fit.holdout_nmse == pytest.approx(expected, rel=1e-4)


def test_cross_validation_foretells_the_error_on_fresh_rows() -> None:
    weight = draw(1, 30, 4)
    x, fresh = draw(0, 200, 30), draw(3, 20_000, 30)
    fit = fit_linear(moments(x, x @ weight + 3 * draw(2, 200, 4)))
    real = nmse(fit, fresh, fresh @ weight + 3 * draw(4, 20_000, 4))
    assert fit.holdout_nmse == pytest.approx(real, rel=0.15)  # 200 rows: some 10 % of chance
    assert fit.nmse < real


@given(seeds)
def test_the_predictions_do_not_depend_on_the_units(seed: int) -> None:
    x = draw(seed, 400, 6)
    y = torch.tanh(x @ draw(seed + 1, 6, 2))
    scale, offset = 2.0 ** torch.arange(-6, 6, 2), 7.0
    plain = fit_linear(moments(x, y), ridge=1e-2)
    other = fit_linear(moments(x * scale + offset, y), ridge=1e-2)
    torch.testing.assert_close(
        predict(plain, x), predict(other, x * scale + offset), rtol=0, atol=RECOVERY_TOLERANCE
    )
