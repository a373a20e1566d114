"""What a site should give for the stream to come back."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nbl_compiler.refitting.target import correction

ROWS, WIDTH = 40, 8
seeds = st.integers(0, 1000)


def some_rows(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, a small Δ, and gains g of one order of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(ROWS, WIDTH, generator=generator) * 3
    missing = 1e-3 * torch.randn(ROWS, WIDTH, generator=generator)
    gain = 1 + torch.rand(WIDTH, generator=generator)
    return y, missing, gain


@given(seeds, st.sampled_from([1.0, 0.22, -2.0]))
def test_a_sum_is_corrected_by_what_is_missing(seed: int, factor: float) -> None:
    y, missing, _ = some_rows(seed)
    change = correction(y, factor * y, missing)
    assert change is not None
    torch.testing.assert_close(factor * change, missing, rtol=1e-5, atol=1e-8)


@given(seeds)
def test_behind_an_rms_norm_the_change_brings_the_stream_closer(seed: int) -> None:
    y, missing, gain = some_rows(seed)

    def norm(rows: Tensor) -> Tensor:
        return gain * F.rms_norm(rows, (WIDTH,))

    change = correction(y, norm(y), missing)
    assert change is not None
    assert float((change * y).sum(-1).abs().max()) < 1e-5  # the norm would take it out again
    # What lies along y cannot be put back; of the rest most is.
    reachable = missing / gain
    reachable = reachable - y * (reachable * y).sum(-1, keepdim=True) / y.square().sum(-1, True)
    left = norm(y + change) - norm(y) - gain * reachable
    assert float(left.norm()) < 0.1 * float((gain * reachable).norm())


@given(seeds)
def test_components_that_hardly_reach_the_stream_are_not_blown_up(seed: int) -> None:
    y, missing, gain = some_rows(seed)
    gain[0] = 1e-4
    change = correction(y, gain * y, missing)
    assert change is not None
    assert float(change[:, 0].abs().max()) < float(missing.abs().max())


@pytest.mark.parametrize("seed", range(3))
def test_other_functions_get_no_correction(seed: int) -> None:
    y, missing, _ = some_rows(seed)
    assert correction(y, torch.tanh(y), missing) is None
