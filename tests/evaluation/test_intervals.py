"""Confidence intervals by the bootstrap over documents."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nbl_compiler.evaluation.bootstrap import estimate


def mean(totals: Tensor) -> Tensor:
    return totals[..., 0] / totals[..., 1]


@given(st.integers(1, 30), st.floats(-5, 5))
def test_documents_that_agree_leave_no_doubt(units: int, value: float) -> None:
    sums = torch.tensor([[value * n, n] for n in range(1, units + 1)], dtype=torch.float64)
    found = estimate(sums, mean)
    for figure in (found.value, found.low, found.high):
        assert abs(figure - value) < 1e-12 * max(1.0, abs(value))


def test_the_interval_holds_the_truth_nineteen_times_in_twenty() -> None:
    """60 documents of unequal length each time; the true mean is 2."""
    generator = torch.Generator().manual_seed(0)
    trials, inside = 400, 0
    for trial in range(trials):
        tokens = torch.randint(50, 500, (60,), generator=generator).double()
        level = 2 + 0.3 * torch.randn(60, generator=generator, dtype=torch.float64)
        found = estimate(torch.stack([level * tokens, tokens], 1), mean, seed=trial)
        inside += found.low <= 2 <= found.high
    # Binomial: 0.95 ± 0.011 (one standard deviation); the percentile interval is a little narrow.
    assert 0.91 < inside / trials < 0.98


@given(st.integers(2, 12), st.integers(0, 10_000))
def test_intervals_stay_within_the_documents(units: int, seed: int) -> None:
    """No draw leaves the range of the documents' own means."""
    generator = torch.Generator().manual_seed(seed)
    sums = torch.rand(units, 2, generator=generator, dtype=torch.float64) + 0.5
    found = estimate(sums, mean)
    ratios = sums[:, 0] / sums[:, 1]
    assert float(ratios.min()) - 1e-9 <= found.low <= found.high <= float(ratios.max()) + 1e-9
