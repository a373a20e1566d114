"""The canonical-correlation bound against a direct computation on the rows."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nbl_compiler.solvers.cca import cca_bound
from nbl_compiler.solvers.least_squares import fit_linear
from nbl_compiler.solvers.moments import Moments

# Float32 products (2⁻²⁴ each) times the condition numbers of these small problems.
TOLERANCE = 1e-4

seeds = st.integers(0, 10_000)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bound(x: Tensor, y: Tensor, stream: Tensor) -> float:
    moments = Moments.zeros(x.shape[1], y.shape[1])
    moments.add(x, y, stream)
    return cca_bound(moments)


def direct(x: Tensor, t: Tensor) -> float:
    """Σ (1 − cos²θ) over the principal angles θ between the centred column spaces."""
    xc, tc = (np.asarray(a.double() - a.double().mean(0)) for a in (x, t))
    angles = scipy.linalg.subspace_angles(xc, tc)
    correlations = np.zeros(t.shape[1])
    correlations[: len(angles)] = np.cos(angles)
    return float((1 - correlations**2).sum())


@given(seeds, st.integers(1, 7), st.integers(1, 7))
def test_the_bound_is_that_of_the_principal_angles(seed: int, inputs: int, outputs: int) -> None:
    x, stream = draw(seed, 300, inputs) + 1, draw(seed + 1, 300, outputs)
    y = torch.tanh(x @ draw(seed + 2, inputs, outputs))
    assert bound(x, y, stream) == pytest.approx(direct(x, y + stream), abs=TOLERANCE)


@given(seeds)
def test_a_linear_function_has_bound_zero(seed: int) -> None:
    x = draw(seed, 200, 6)
    y = x @ (torch.eye(6) + 0.1 * draw(seed + 1, 6, 6)) + 5  # well conditioned, also with x
    assert bound(x, y, x) == pytest.approx(0, abs=TOLERANCE)


@given(seeds)
def test_unrelated_rows_have_the_bound_of_their_width(seed: int) -> None:
    x, y = draw(seed, 20_000, 4), draw(seed + 1, 20_000, 3)
    # E[ρ²] of unrelated rows is d / n.
    assert bound(x, y, torch.zeros_like(y)) == pytest.approx(3, abs=0.01)


@given(seeds)
def test_invertible_maps_change_nothing(seed: int) -> None:
    x, stream = draw(seed, 300, 5), draw(seed + 1, 300, 4)
    y = torch.sin(x @ draw(seed + 2, 5, 4))
    left, right = torch.eye(5) + 0.2 * draw(seed + 3, 5, 5), torch.eye(4) * 3 - 0.3
    before = bound(x, y, stream)
    after = bound(x @ left + 10, y @ right - 4, stream @ right)
    assert after == pytest.approx(before, abs=TOLERANCE)


@given(seeds)
def test_the_bound_bounds_the_error_of_the_whitened_stream(seed: int) -> None:
    """Theorem 3.2: the NMSE of the linear map is at most the bound (T whitened: bound / d_out)."""
    x, stream = draw(seed, 400, 5), draw(seed + 1, 400, 4)
    t = torch.tanh(x @ draw(seed + 2, 5, 4)) + stream
    moments = Moments.zeros(5, 4)
    moments.add(x, t, torch.zeros_like(t))
    assert fit_linear(moments, ridge=0.0).nmse <= cca_bound(moments) + TOLERANCE


def test_directions_that_never_vary_are_left_out() -> None:
    x, t = draw(0, 200, 5), draw(1, 200, 4)
    x[:, 1], t[:, 2] = 7.0, 0.0
    kept = bound(x[:, [0, 2, 3, 4]], t[:, [0, 1, 3]], torch.zeros(200, 3))
    assert bound(x, t, torch.zeros_like(t)) == pytest.approx(kept, abs=TOLERANCE)


def test_fewer_rows_than_dimensions_stay_in_range() -> None:
    x, y = draw(0, 20, 64), draw(1, 20, 64)
    assert 0 <= bound(x, y, torch.zeros_like(y)) <= 64
