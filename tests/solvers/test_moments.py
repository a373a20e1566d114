"""Streaming moments: the same sums however the rows arrive."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nbl_compiler.errors import CalibrationError
from nbl_compiler.solvers.moments import BLOCK_ROWS, BufferedMoments, Moments, merge

INPUTS, OUTPUTS = 5, 4
# Products are taken in float32: 2⁻²⁴ ≈ 6e-8 of Σ|a b| each, with a margin for sums of them.
PRODUCT_TOLERANCE = 1e-5
# Order of float64 additions only.
MERGE_TOLERANCE = 1e-12

Rows = tuple[Tensor, Tensor, Tensor]
seeds = st.integers(0, 10_000)


def rows(seed: int, count: int, offset: float = 0.0, dtype: torch.dtype = torch.float32) -> Rows:
    generator = torch.Generator().manual_seed(seed)

    def draw(width: int) -> Tensor:
        mix = torch.randn(width, width, generator=generator)
        return (torch.randn(count, width, generator=generator) @ mix + offset).to(dtype)

    return draw(INPUTS), draw(OUTPUTS), draw(OUTPUTS)


def moments(given_rows: Rows) -> Moments:
    result = Moments.zeros(INPUTS, OUTPUTS)
    result.add(*given_rows)
    return result


def assert_same(first: Moments, second: Moments, tolerance: float) -> None:
    """Compare about the second's mean, relative to the spread (not to the offset)."""
    assert first.count == second.count
    second = second.centred()
    first = first.about(second.shift_x, second.shift_y, second.shift_t)
    for name in ("xx", "yx", "tx", "tt", "yy", "sum_x", "sum_y", "sum_t"):
        a, b = getattr(first, name), getattr(second, name)
        scale = max(float(second.xx.trace()), float(second.tt.trace()), 1.0)
        torch.testing.assert_close(
            a, b, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: n + m
        )


def exact(given_rows: Rows) -> Moments:
    """The same moments in float64, about the true mean."""
    x, y, _stream = (r.double() for r in given_rows)
    t = (given_rows[1].float() + given_rows[2].float()).double()
    means = (x.mean(0), y.mean(0), t.mean(0))
    cx, cy, ct = x - means[0], y - means[1], t - means[2]
    return Moments(
        len(x), *means, cx.sum(0), cy.sum(0), ct.sum(0),
        cx.T @ cx, cy.T @ cx, ct.T @ cx, ct.T @ ct, cy.square().sum(0),
    )  # fmt: skip


@given(seeds, st.lists(st.integers(1, 700), min_size=1, max_size=8))
def test_buffered_moments_do_not_depend_on_the_cuts(seed: int, cuts: list[int]) -> None:
    given_rows = rows(seed, sum(cuts))
    whole = BufferedMoments(INPUTS, OUTPUTS, torch.device("cpu"))
    whole.add(*given_rows)
    cut = BufferedMoments(INPUTS, OUTPUTS, torch.device("cpu"))
    for parts in zip(*(r.split(cuts) for r in given_rows), strict=True):
        cut.add(*parts)
    first, second = whole.flush(), cut.flush()
    for name, value in vars(first).items():
        other = getattr(second, name)
        assert torch.equal(value, other) if isinstance(value, Tensor) else value == other, name


@given(seeds, st.lists(st.integers(0, 60), min_size=1, max_size=6))
def test_plain_moments_do_not_depend_on_the_cuts(seed: int, cuts: list[int]) -> None:
    given_rows = rows(seed, sum(cuts) + 2)
    cut = Moments.zeros(INPUTS, OUTPUTS)
    for parts in zip(*(r.split([*cuts, 2]) for r in given_rows), strict=True):
        cut.add(*parts)
    assert_same(cut, exact(given_rows), PRODUCT_TOLERANCE)


@given(seeds)
def test_moments_do_not_depend_on_the_order(seed: int) -> None:
    given_rows = rows(seed, 50)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(seed))
    shuffled = tuple(r[order] for r in given_rows)
    assert_same(moments(shuffled), moments(given_rows), PRODUCT_TOLERANCE)


@given(seeds, st.integers(0, 40), st.integers(1, 40), st.integers(1, 40))
def test_merge_commutes_and_associates(seed: int, a: int, b: int, c: int) -> None:
    first, second, third = (moments(rows(seed + i, n)) for i, n in enumerate((a, b, c)))
    assert_same(merge(first, second), merge(second, first), MERGE_TOLERANCE)
    left, right = merge(merge(first, second), third), merge(first, merge(second, third))
    assert_same(left, right, MERGE_TOLERANCE)


@given(seeds, st.integers(1, 40), st.integers(1, 40))
def test_merge_is_the_moments_of_both_row_sets(seed: int, a: int, b: int) -> None:
    first, second = rows(seed, a), rows(seed + 1, b, offset=3.0)
    both = tuple(torch.cat(pair) for pair in zip(first, second, strict=True))
    assert_same(merge(moments(first), moments(second)), exact(both), PRODUCT_TOLERANCE)


def test_the_empty_moments_are_neutral() -> None:
    own = moments(rows(0, 20))
    assert_same(merge(own, Moments.zeros(INPUTS, OUTPUTS)), own, MERGE_TOLERANCE)
    assert merge(Moments.zeros(INPUTS, OUTPUTS), own) is own


def test_adding_after_a_merge_keeps_the_sums_exact() -> None:
    """A merged shift is no float32 number; what is subtracted in float32 must be what is noted."""
    first, second, third = (rows(i, 40, offset=1e4) for i in range(3))
    total = merge(moments(first), moments(second)).centred()
    total.add(*third)
    everything = tuple(torch.cat(parts) for parts in zip(first, second, third, strict=True))
    expected = exact(everything)
    assert_same(total, expected, PRODUCT_TOLERANCE)
    # A mean of 1e4 has a float32 step of 1e-3; the sums know it far better.
    torch.testing.assert_close(total.mean_x, expected.mean_x, rtol=0, atol=1e-6)


@given(seeds, st.floats(-1e3, 1e3))
def test_moments_about_a_shifted_point_describe_the_same_rows(seed: int, shift: float) -> None:
    own = moments(rows(seed, 30))
    moved = own.about(own.shift_x + shift, own.shift_y - shift, own.shift_t + 2 * shift)
    torch.testing.assert_close(moved.mean_x, own.mean_x)
    torch.testing.assert_close(moved.mean_y, own.mean_y)
    # Going there and back loses (shift / spread)² of float64's 1e-16.
    assert_same(moved, own, 1e-6)


@pytest.mark.parametrize("offset", [1e2, -1e4])
def test_large_offsets_do_not_cancel(offset: float) -> None:
    given_rows = rows(5, 5000, offset=offset)
    buffered = BufferedMoments(INPUTS, OUTPUTS, torch.device("cpu"))
    buffered.add(*given_rows)
    assert_same(buffered.flush(), exact(given_rows), PRODUCT_TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_rows_of_other_dtypes_count_as_float32(dtype: torch.dtype) -> None:
    given_rows = rows(1, 300, dtype=dtype)
    assert_same(moments(given_rows), exact(given_rows), PRODUCT_TOLERANCE)
    buffered = BufferedMoments(INPUTS, OUTPUTS, torch.device("cpu"))
    buffered.add(*given_rows)
    assert_same(buffered.flush(), exact(given_rows), PRODUCT_TOLERANCE)


def test_float32_products_stay_exact_under_autocast_and_reduced_precision() -> None:
    given_rows = rows(2, 2000)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            own = moments(given_rows)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert_same(own, exact(given_rows), PRODUCT_TOLERANCE)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e30])
def test_nan_infinity_and_overflow_are_refused(which: int, value: float) -> None:
    given_rows = rows(0, 50)
    given_rows[which][7, 2] = value
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        moments(given_rows)
    buffered = BufferedMoments(INPUTS, OUTPUTS, torch.device("cpu"))
    buffered.add(*given_rows)  # pending
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        buffered.flush()


def test_rows_may_be_overwritten_after_they_were_added() -> None:
    given_rows = rows(3, 100)
    expected = exact(given_rows)
    buffered = BufferedMoments(INPUTS, OUTPUTS, torch.device("cpu"))
    buffered.add(*given_rows)
    for r in given_rows:
        r.fill_(float("nan"))
    assert_same(buffered.flush(), expected, PRODUCT_TOLERANCE)


def test_adding_does_not_change_the_rows() -> None:
    given_rows = rows(3, BLOCK_ROWS + 10)
    copies = tuple(r.clone() for r in given_rows)
    BufferedMoments(INPUTS, OUTPUTS, torch.device("cpu")).add(*given_rows)
    moments(given_rows)
    for r, copy in zip(given_rows, copies, strict=True):
        assert torch.equal(r, copy)


def test_memory_does_not_grow_with_the_rows() -> None:
    sizes = []
    for count in (5_000, 50_000):
        buffered = BufferedMoments(INPUTS, OUTPUTS, torch.device("cpu"))
        for part in range(count // 500):
            buffered.add(*rows(part, 500))
        sizes.append(buffered.nbytes)
    assert sizes[0] == sizes[1]


def test_held_out_moments_keep_nothing_of_the_stream() -> None:
    given_rows = rows(0, 40)
    own = Moments.zeros(INPUTS, OUTPUTS, stream=False)
    own.add(*given_rows)
    assert own.tt.numel() == own.tx.numel() == 0
    full = exact(given_rows)
    atol = PRODUCT_TOLERANCE * float(full.xx.trace())
    torch.testing.assert_close(own.centred().yx, full.yx, rtol=0, atol=atol)


def test_the_default_dtype_plays_no_part() -> None:
    given_rows = rows(4, 100)
    torch.set_default_dtype(torch.float64)
    try:
        buffered = BufferedMoments(INPUTS, OUTPUTS, torch.device("cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
    buffered.add(*given_rows)
    assert_same(buffered.flush(), exact(given_rows), PRODUCT_TOLERANCE)
