"""Histograms are an exact commutative monoid; hot ranges cover what they say, at least error."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nbl_compiler.errors import CalibrationError
from nbl_compiler.solvers.activations import activation
from nbl_compiler.solvers.affine_fit import least_squares_affine
from nbl_compiler.solvers.hot_ranges import (
    COVERAGE_LEVELS,
    CoverageCurves,
    allocate_coverage,
    coverage_curves,
    range_moments,
)
from nbl_compiler.solvers.ranges import RangeHistogram

# Bins are taken as uniform; with 512 of them the fit's slope moves by less than this.
BINNING = 2e-3


def sample(tokens: int, neurons: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(tokens, neurons, generator=generator, dtype=torch.float64)
    return z * torch.logspace(-3, 3, neurons) + torch.linspace(-2, 2, neurons)


def histogram(z: torch.Tensor, bins: int = 64) -> RangeHistogram:
    result = RangeHistogram(z.shape[1], bins)
    result.observe(z)
    return result


def assert_equal(left: RangeHistogram, right: RangeHistogram) -> None:
    assert left.tokens == right.tokens
    for name in ("counts", "exponent", "origin", "minimum", "maximum"):
        assert torch.equal(getattr(left, name), getattr(right, name)), name


def assert_counts(counted: RangeHistogram, z: torch.Tensor) -> None:
    """Every neuron's counts are those of its values between its edges."""
    edges = counted.edges()
    for neuron in range(z.shape[1]):
        inner = torch.searchsorted(edges[neuron], z[:, neuron].contiguous(), right=True) - 1
        direct = torch.bincount(inner, minlength=counted.bins)
        assert torch.equal(counted.counts[neuron], direct)


def test_counts_are_exact() -> None:
    z = sample(3000, 7)
    assert_counts(histogram(z), z)


@settings(deadline=None)
@given(cuts=st.lists(st.integers(0, 500), max_size=6), seed=st.integers(0, 20))
def test_the_cut_of_the_stream_does_not_matter(cuts: list[int], seed: int) -> None:
    z = sample(500, 5, seed)
    whole = histogram(z)
    pieces = RangeHistogram(5, 64)
    for start, stop in itertools.pairwise([0, *sorted(cuts), 500]):
        pieces.observe(z[start:stop])
    assert_equal(pieces, whole)


@settings(deadline=None)
@given(cuts=st.tuples(st.integers(0, 500), st.integers(0, 500)), seed=st.integers(0, 20))
def test_merge_is_commutative_and_associative(cuts: tuple[int, int], seed: int) -> None:
    z = sample(500, 5, seed)
    first, second = sorted(cuts)
    a, b, c = (histogram(part) for part in (z[:first], z[first:second], z[second:]))
    assert_equal(a.merge(b), b.merge(a))
    assert_equal(a.merge(b).merge(c), a.merge(b.merge(c)))
    assert_equal(a.merge(b).merge(c), histogram(z))


def test_merge_leaves_its_operands_alone() -> None:
    z = sample(200, 3)
    a, b = histogram(z[:90]), histogram(z[90:])
    merged = a.merge(b)
    merged.observe(100 * z)
    assert_equal(a, histogram(z[:90]))
    assert_equal(b, histogram(z[90:]))


@settings(deadline=None)
@given(
    values=st.lists(
        st.floats(-1e30, 1e30, allow_subnormal=False).filter(lambda v: v == 0 or abs(v) > 1e-30),
        min_size=1,
        max_size=30,
    )
)
def test_any_finite_values_are_held(values: list[float]) -> None:
    z = torch.tensor(values, dtype=torch.float64)[:, None]
    counted = histogram(z)
    assert int(counted.counts.sum()) == len(values)
    assert_counts(counted, z)


def test_memory_does_not_grow_with_tokens() -> None:
    z = sample(4000, 3)
    assert histogram(z).counts.shape == histogram(z[:10]).counts.shape == (3, 64)


def test_half_precision_and_leading_dimensions() -> None:
    z = sample(60, 4).to(torch.bfloat16)
    assert_equal(histogram(z.reshape(3, 20, 4).flatten(0, 1)), histogram(z.double()))
    counted = RangeHistogram(4, 64)
    counted.observe(z.reshape(3, 20, 4))
    assert counted.tokens == 60
    counted.observe(z[:0])
    assert counted.tokens == 60


def hot_ranges(counted: RangeHistogram, coverage: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return every neuron's range at one of the levels."""
    curves = coverage_curves(counted, activation("gelu"))
    level = COVERAGE_LEVELS.index(coverage)
    return curves.select(torch.full((counted.neurons,), level))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_are_refused_and_leave_no_trace(bad: float) -> None:
    z = sample(20, 3)
    counted = RangeHistogram(3, 64, name="model.layers.3.mlp")
    counted.observe(z)
    poisoned = z.clone()
    poisoned[7, 1] = bad
    with pytest.raises(CalibrationError, match=r"model\.layers\.3\.mlp: NaN or infinite"):
        counted.observe(poisoned)
    assert_equal(counted, histogram(z))


def test_misuse() -> None:
    with pytest.raises(ValueError, match="even number"):
        RangeHistogram(3, 7)
    with pytest.raises(ValueError, match="same neurons and bins"):
        RangeHistogram(3, 8).merge(RangeHistogram(4, 8))
    with pytest.raises(CalibrationError, match="no calibration token"):
        hot_ranges(RangeHistogram(3, 8), 0.9)


@pytest.mark.parametrize("coverage", [0.05, 0.5, 0.9, 0.99, 1.0])
def test_hot_ranges_cover_the_target(coverage: float) -> None:
    z = sample(5000, 6)
    lo, hi = hot_ranges(histogram(z, 512), coverage)
    inside = ((z >= lo) & (z < hi)).double().mean(0)
    assert bool((inside >= coverage).all())
    # No more than one bin too many: about 1% of a normal distribution with these bins.
    assert bool((inside <= coverage + 0.02).all())


def test_hot_ranges_sit_where_the_density_is() -> None:
    """90 % around 3, 10 % around −3: the hot range of 85 % lies around 3 alone."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(4000, 1, generator=generator, dtype=torch.float64) * 0.2 + 3
    z[:400] -= 6
    lo, hi = hot_ranges(histogram(z, 256), 0.85)
    assert 2 < float(lo) < 3 < float(hi) < 4


def test_a_gap_does_not_stop_the_growth() -> None:
    z = torch.cat([torch.zeros(50), torch.full((50,), 10.0)]).double()[:, None]
    lo, hi = hot_ranges(histogram(z), 1.0)
    assert float(lo) <= 0
    assert float(hi) > 10


def test_fits_from_bins_are_fits_to_the_samples() -> None:
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(20_000, 6, generator=generator, dtype=torch.float64)
    z = z * torch.linspace(0.3, 3, 6) + torch.linspace(-2, 2, 6)
    counted, sigma = histogram(z, 512), activation("gelu")
    lo, hi = hot_ranges(counted, 0.9)
    fit = least_squares_affine(sigma, lo, hi, range_moments(counted, sigma, lo, hi))
    for neuron in range(6):
        inside = (z[:, neuron] >= lo[neuron]) & (z[:, neuron] < hi[neuron])
        own = z[inside, neuron]
        design = torch.stack([own, torch.ones_like(own)], 1)
        solution = torch.linalg.lstsq(design, sigma(own)[:, None]).solution[:, 0]
        torch.testing.assert_close(fit.slope[neuron], solution[0], rtol=0, atol=BINNING)
        torch.testing.assert_close(fit.intercept[neuron], solution[1], rtol=0, atol=BINNING)


def test_curves_are_nested_and_their_errors_are_real() -> None:
    z = sample(4000, 5)
    counted, sigma = histogram(z, 512), activation("gelu")
    curves = coverage_curves(counted, sigma)
    assert bool((curves.lo.diff(dim=1) <= 0).all())
    assert bool((curves.hi.diff(dim=1) >= 0).all())
    levels = torch.tensor(COVERAGE_LEVELS, dtype=torch.float64)
    assert bool((curves.coverage >= levels - 1e-12).all())
    for level in (5, 17, len(COVERAGE_LEVELS) - 1):
        lo, hi = curves.select(torch.full((5,), level))
        fit = least_squares_affine(sigma, lo, hi, range_moments(counted, sigma, lo, hi))
        inside = (z >= lo) & (z < hi)
        error = ((sigma(z) - fit.slope * z - fit.intercept) * inside).square().mean(0)
        torch.testing.assert_close(curves.error[:, level], error, rtol=0.05, atol=1e-7)


def _toy_curves(generator: torch.Generator, neurons: int) -> CoverageCurves:
    levels = torch.tensor(COVERAGE_LEVELS, dtype=torch.float64).expand(neurons, -1)
    power = 1 + 3 * torch.rand(neurons, 1, generator=generator, dtype=torch.float64)
    scale = torch.rand(neurons, 1, generator=generator, dtype=torch.float64)
    error = scale * levels**power
    return CoverageCurves(lo=-levels, hi=levels, coverage=levels, error=error)


@settings(deadline=None)
@given(target=st.floats(0.05, 1.0), seed=st.integers(0, 50))
def test_allocation_reaches_the_target_and_no_exchange_improves_it(
    target: float, seed: int
) -> None:
    """Optimality: no neuron's step up costs less than another's step down of equal size saves."""
    generator = torch.Generator().manual_seed(seed)
    curves = [_toy_curves(generator, 6), _toy_curves(generator, 9)]
    weights = [torch.rand(n, generator=generator, dtype=torch.float64) + 0.1 for n in (6, 9)]
    chosen = allocate_coverage(curves, weights, target)
    assert [level.shape[0] for level in chosen] == [6, 9]
    level = torch.cat(chosen)
    coverage = torch.cat([curve.coverage for curve in curves])
    cost = torch.cat([w[:, None] * c.error for w, c in zip(weights, curves, strict=True)])
    mean = float(coverage.gather(1, level[:, None]).mean())
    assert mean >= target - 1e-12
    price = cost.diff(dim=1) / coverage.diff(dim=1)  # convex curves: increasing
    up = [price[i, n] for i, n in enumerate(level.tolist()) if n < price.shape[1]]
    down = [price[i, n - 1] for i, n in enumerate(level.tolist()) if n > 0]
    if up and down:
        assert max(down) <= min(up) * (1 + 1e-9)


def test_allocation_prefers_neurons_that_are_linear() -> None:
    """A neuron without error is covered fully; the others make room."""
    generator = torch.Generator().manual_seed(0)
    curves = _toy_curves(generator, 4)
    curves.error[0] = 0
    (level,) = allocate_coverage([curves], [torch.ones(4)], 0.8)
    assert int(level[0]) == len(COVERAGE_LEVELS) - 1
    assert int(level[1:].min()) < len(COVERAGE_LEVELS) - 1
