"""Value states against their definition, on any mask that looks back."""

from __future__ import annotations

import pytest
import torch
from helpers.naive_states import naive_states
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nbl_compiler.lowering.value_states import (
    carried_states,
    count_of_mask,
    count_without_mask,
    joined_rows,
    last_positions,
    looks_back,
    newest_rows,
    value_states,
)
from nbl_compiler.value_states import States, joined_weight, split_weight

# A few roundings of float32 on numbers of size 1; and what lies beyond REACH: 0.8^64.
TOLERANCE = 5e-6
HEADS, WIDTH = 2, 3


@st.composite
def masks(draw: st.DrawFn, window: bool = True) -> Tensor:
    """Return a mask [B, T, T]: documents side by side, and perhaps a window."""
    length = draw(st.integers(1, 150))
    reach = draw(st.integers(1, 80)) if window and draw(st.booleans()) else length
    rows = []
    for _ in range(draw(st.integers(1, 2))):
        starts = draw(st.lists(st.integers(1, length), max_size=3))
        document = torch.zeros(length, dtype=torch.long)
        for start in starts:
            document[start:] += 1
        token = torch.arange(length)
        lag = token[:, None] - token
        same = document[:, None] == document
        rows.append((lag >= 0) & (lag < reach) & same)
    return torch.stack(rows)


def values_for(mask: Tensor, seed: int) -> Tensor:
    """Return random values [B, H, T, D]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(mask.shape[0], HEADS, mask.shape[1], WIDTH, generator=generator)


kinds = st.builds(States, st.integers(0, 3), st.booleans()).filter(bool)


@given(masks(), kinds, st.integers(0, 2**16))
def test_states_are_as_defined(mask: Tensor, states: States, seed: int) -> None:
    values = values_for(mask, seed)
    count = count_of_mask(mask.unsqueeze(1))
    positions = last_positions(values, values)
    found = value_states(values, positions, count, states.taps, states.averages)
    expected = naive_states(values, mask, states).float()
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@given(masks(), kinds, st.integers(0, 2**16), st.data())
def test_a_call_in_pieces_is_the_call(
    mask: Tensor, states: States, seed: int, data: st.DataObject
) -> None:
    """Rows of a static cache: those behind the call's own hold any numbers."""
    values = values_for(mask, seed)
    length = mask.shape[1]
    start = data.draw(st.integers(0, length - 1))
    stop = data.draw(st.integers(start + 1, length))
    cache = torch.cat([values[:, :, :stop], torch.full_like(values, 1e6)], 2)
    count = count_of_mask(mask[:, start:stop].unsqueeze(1))
    found = value_states(cache, torch.arange(start, stop), count, states.taps, states.averages)
    expected = naive_states(values, mask, states).float()[:, start:stop]
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@given(masks(window=False), st.integers(0, 3), st.integers(0, 2**16), st.data())
def test_carried_sums_are_as_good_as_all_rows(
    mask: Tensor, taps: int, seed: int, data: st.DataObject
) -> None:
    values = values_for(mask, seed)
    batch, length = mask.shape[:2]
    past = torch.zeros(batch, HEADS, taps, WIDTH)
    sums = torch.zeros(batch, HEADS, 2, WIDTH)
    parts, start = [], 0
    while start < length:
        stop = data.draw(st.sampled_from([start + 1, length, (start + length + 1) // 2]))
        new = values[:, :, start:stop]
        count = count_of_mask(mask[:, start:stop].unsqueeze(1))
        states, sums = carried_states(new, count, past, sums, taps)
        past = newest_rows(joined_rows(past, new), past)
        parts.append(states)
        start = stop
    expected = naive_states(values, mask, States(taps, averages=True)).float()
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=TOLERANCE, rtol=0)


@given(masks(), st.booleans())
def test_masks_of_numbers_count_like_masks_of_truths(mask: Tensor, infinite: bool) -> None:
    lowest = float("-inf") if infinite else torch.finfo(torch.float32).min
    added = torch.where(mask, 0.25, lowest).unsqueeze(1).expand(-1, 3, -1, -1)
    assert torch.equal(count_of_mask(added), mask.sum(-1))
    assert torch.equal(count_of_mask(added[0, 0]), mask[:1].sum(-1))


def test_counts_without_a_mask() -> None:
    values = torch.zeros(2, HEADS, 3, WIDTH)
    assert count_without_mask(values, 0).tolist() == [[1, 2, 3]]
    assert count_without_mask(values, 5).tolist() == [[6, 7, 8]]


@given(masks())
def test_masks_that_look_back_are_known(mask: Tensor) -> None:
    assert looks_back(mask.unsqueeze(1)).all()


def test_masks_that_look_elsewhere_are_known() -> None:
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    ahead, hole, not_self = causal.clone(), causal.clone(), causal.clone()
    ahead[1, 2], hole[3, 1], not_self[2, 2] = True, False, False
    found = [looks_back(mask).flatten().tolist() for mask in (causal, ahead, hole, not_self)]
    assert found == [
        [True, True, True, True],
        [True, False, True, True],
        [True, True, True, False],
        [True, True, False, True],
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_averaged_in_float32(dtype: torch.dtype) -> None:
    """A mean of 3,000 equal values is that value; added up in a half it would stop growing."""
    values = torch.full((1, 1, 3000, 1), 1.5, dtype=dtype)
    count = count_without_mask(values, 0)
    found = value_states(values, last_positions(values, values), count, 0, True)
    assert found.dtype == dtype
    assert torch.equal(found, torch.full_like(found, 1.5))


@given(kinds, st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_a_map_is_cut_and_joined(states: States, rows: int, width: int, each: int) -> None:
    weight = torch.arange(rows * (width + states.vectors * each), dtype=torch.float32)
    weight = weight.view(rows, -1)
    parts = split_weight(weight, width, states)
    assert parts["weight"].shape == (rows, width)
    assert ("taps" in parts, "averages" in parts) == (states.taps > 0, states.averages)
    assert torch.equal(joined_weight(parts), weight)
