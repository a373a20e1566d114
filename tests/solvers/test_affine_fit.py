"""Affine fits: least squares equals a direct regression, minimax equioscillates."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nbl_compiler.solvers.activation_errors import affine_residual_extremes, max_affine_error
from nbl_compiler.solvers.activations import ACTIVATION_NAMES, activation
from nbl_compiler.solvers.affine_fit import (
    ActivationMoments,
    least_squares_affine,
    minimax_affine,
)

# The slope is bisected to 1e-13; the error inherits that times the width of the range.
EQUIOSCILLATION = 1e-11
SAMPLES = 2001
# Errors this far above the sampling error, relative to the squared width, can be seen to alternate.
SMOOTH_ENOUGH = 1e-5

every_activation = pytest.mark.parametrize("name", ACTIVATION_NAMES)


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sample_moments(name: str, z: torch.Tensor) -> ActivationMoments:
    """Moments of samples [n, f] that all lie in the range."""
    value = activation(name)(z)
    dz, dv = z - z.mean(0), value - value.mean(0)
    return ActivationMoments(
        weight=torch.ones_like(z[0]),
        z=z.mean(0),
        value=value.mean(0),
        z_variance=dz.square().mean(0),
        covariance=(dz * dv).mean(0),
        value_variance=dv.square().mean(0),
    )


# Many ranges an example: the fit is vectorised, and one call costs the same for 1 and for 30.
ranges = st.lists(st.tuples(st.floats(-10, 10), st.floats(-10, 10)), min_size=1, max_size=30)
few_examples = settings(deadline=None, max_examples=5)


def ends_of(pairs: list[tuple[float, float]]) -> tuple[torch.Tensor, torch.Tensor]:
    ends = torch.tensor(pairs, dtype=torch.float64)
    return ends.amin(1), ends.amax(1)


def samples_of(lo: torch.Tensor, hi: torch.Tensor, extra: tuple[float, ...]) -> torch.Tensor:
    """[n, f] points of each range, ascending, its ends and the extra points included."""
    steps = torch.linspace(0, 1, SAMPLES, dtype=torch.float64)[:, None]
    points = torch.cat([lo + steps * (hi - lo), double(*extra)[:, None].expand(-1, lo.numel())])
    return torch.minimum(torch.maximum(points, lo), hi).sort(0).values


@every_activation
@few_examples
@given(pairs=ranges)
def test_minimax_equioscillates(name: str, pairs: list[tuple[float, float]]) -> None:
    """±error is reached at three alternating points: Chebyshev's condition for optimality."""
    sigma, (lo, hi) = activation(name), ends_of(pairs)
    fit = minimax_affine(sigma, lo, hi)
    extremes = affine_residual_extremes(sigma, lo, hi, fit.slope)
    top, bottom = extremes.highest - fit.intercept, extremes.lowest - fit.intercept
    torch.testing.assert_close(top, -bottom, rtol=0, atol=EQUIOSCILLATION)
    z = samples_of(lo, hi, sigma.breakpoints)
    residual = sigma(z) - fit.slope * z - fit.intercept
    # Sampling misses an extreme by at most |σ''| ≤ 2 times half the squared step.
    near = residual.abs() >= top - EQUIOSCILLATION - ((hi - lo) / (SAMPLES - 1)).square()
    for neuron in range(lo.numel()):
        if top[neuron] > SMOOTH_ENOUGH * (hi - lo)[neuron].square() + EQUIOSCILLATION:
            signs = residual[near[:, neuron], neuron].sign()
            assert int((signs[1:] != signs[:-1]).sum()) >= 2


@every_activation
@few_examples
@given(pairs=ranges, change=st.tuples(st.floats(-0.5, 0.5), st.floats(-0.5, 0.5)))
def test_nothing_beats_minimax(
    name: str, pairs: list[tuple[float, float]], change: tuple[float, float]
) -> None:
    sigma, (lo, hi) = activation(name), ends_of(pairs)
    fit = minimax_affine(sigma, lo, hi)
    other = max_affine_error(sigma, lo, hi, fit.slope + change[0], fit.intercept + change[1])
    assert bool((fit.max_error <= other + EQUIOSCILLATION).all())


def test_minimax_of_relu_is_known() -> None:
    """On [−l, r] the best line has slope r/(l+r) and error l·r / (2(l+r))."""
    fit = minimax_affine(activation("relu"), double(-1.0, -2.0, 0.5), double(1.0, 6.0, 3.0))
    torch.testing.assert_close(fit.slope, double(0.5, 0.75, 1.0), rtol=0, atol=1e-12)
    torch.testing.assert_close(fit.max_error, double(0.25, 0.75, 0.0), rtol=0, atol=1e-11)


def test_minimax_of_a_point_is_exact() -> None:
    fit = minimax_affine(activation("gelu"), double(0.7), double(0.7))
    assert float(fit.max_error) < 1e-12


@pytest.mark.parametrize("ends", [(-math.inf, 0.0), (0.0, math.inf), (0.0, math.nan)])
def test_minimax_refuses_infinite_ranges(ends: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="finite ranges"):
        minimax_affine(activation("gelu"), double(ends[0]), double(ends[1]))


@every_activation
def test_least_squares_is_the_regression(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(5000, 8, generator=generator, dtype=torch.float64) * 1.5 + torch.arange(8) / 4
    sigma = activation(name)
    fit = least_squares_affine(sigma, z.amin(0), z.amax(0), sample_moments(name, z))
    for neuron in range(8):
        design = torch.stack([z[:, neuron], torch.ones(5000, dtype=torch.float64)], 1)
        solution = torch.linalg.lstsq(design, sigma(z[:, neuron : neuron + 1])).solution[:, 0]
        torch.testing.assert_close(fit.slope[neuron], solution[0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(fit.intercept[neuron], solution[1], rtol=1e-9, atol=1e-12)
    residual = (sigma(z) - fit.slope * z - fit.intercept).abs().amax(0)
    assert bool((residual <= fit.max_error).all())


@every_activation
def test_minimax_and_least_squares_each_win_at_their_own_error(name: str) -> None:
    generator = torch.Generator().manual_seed(4)
    z = torch.randn(5000, 6, generator=generator, dtype=torch.float64) * 2
    sigma, moments = activation(name), sample_moments(name, z)
    squares = least_squares_affine(sigma, z.amin(0), z.amax(0), moments)
    minimax = minimax_affine(sigma, z.amin(0), z.amax(0))
    assert bool((minimax.max_error <= squares.max_error).all())

    def mean_square(slope: torch.Tensor, intercept: torch.Tensor) -> torch.Tensor:
        return (sigma(z) - slope * z - intercept).square().mean(0)

    _, _, expected = moments.affine(sigma)
    error = mean_square(squares.slope, squares.intercept)
    torch.testing.assert_close(error, expected, rtol=1e-9, atol=1e-12)
    assert bool((error <= mean_square(minimax.slope, minimax.intercept)).all())


def test_an_exactly_affine_range_has_no_error() -> None:
    z = torch.linspace(0.5, 3, 100, dtype=torch.float64)[:, None]
    fit = least_squares_affine(
        activation("relu"), double(0.5), double(3.0), sample_moments("relu", z)
    )
    torch.testing.assert_close(fit.slope, double(1.0), rtol=0, atol=1e-12)
    assert float(fit.max_error) < 1e-11


def test_a_constant_neuron_gets_its_tangent() -> None:
    sigma, z = activation("gelu"), torch.full((50, 1), -0.3, dtype=torch.float64)
    fit = least_squares_affine(sigma, double(-0.3), double(-0.3), sample_moments("gelu", z))
    torch.testing.assert_close(fit.slope, sigma.derivative(double(-0.3)))
    assert float(fit.max_error) < 1e-12


def test_an_unseen_neuron_gets_the_minimax_fit() -> None:
    nothing = double(0.0, 0.0)
    moments = ActivationMoments(*([nothing] * 6))
    lo, hi = double(-2.0, -1.0), double(1.0, 3.0)
    fit = least_squares_affine(activation("silu"), lo, hi, moments)
    torch.testing.assert_close(fit.slope, minimax_affine(activation("silu"), lo, hi).slope)
