"""Mixed values by their definition, for any lengths, documents and cuts."""

from __future__ import annotations

import pytest
import torch
from helpers.naive_states import naive_mix
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nbl_compiler.lowering.mixed_values import carried_mix, mixed_values
from nbl_compiler.value_states import BUCKETS, MIX_REACH, Gates

# Differences of running sums in float64, a softmax and products in float32; values of size 1.
ROUNDING = 2e-5
HEADS, KV_HEADS, SIZE, WIDTH = 4, 2, 3, 5
lengths = st.integers(1, 60)


def some(seed: int, length: int, batch: int = 2) -> tuple[Tensor, Tensor, Gates]:
    """Return values, hidden states and gates."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(batch, KV_HEADS, length, SIZE, generator=generator)
    x = torch.randn(batch, length, WIDTH, generator=generator)
    shape = (HEADS, 1 + len(BUCKETS))
    weight = torch.randn(*shape, WIDTH, generator=generator)
    return values, x, Gates(weight, torch.randn(*shape, generator=generator))


def documents(length: int, begins: set[int], window: int) -> Tensor:
    """Return which positions each token attends to, [1, T, T]."""
    own = torch.arange(length)
    begin = torch.tensor([max((b for b in begins if b <= t), default=0) for t in range(length)])
    allowed = (own <= own[:, None]) & (own >= begin[:, None]) & (own > own[:, None] - window)
    return allowed.unsqueeze(0)


@settings(max_examples=25)
@given(st.integers(0, 100), lengths, st.sets(st.integers(1, 59), max_size=3), st.integers(1, 70))
def test_rows_give_what_is_defined(seed: int, length: int, begins: set[int], window: int) -> None:
    values, x, gates = some(seed, length)
    allowed = documents(length, begins, window)
    count, positions = allowed.sum(-1), torch.arange(length)
    expected = naive_mix(values, allowed, x, gates).float()
    made = mixed_values(values, positions, count, x, gates.weight, gates.offset)
    torch.testing.assert_close(made, expected, rtol=0, atol=ROUNDING)
    # A single token, among rows of which the later ones are no business of its own.
    token = seed % length
    own = (positions[token : token + 1], count[:, token : token + 1], x[:, token : token + 1])
    one = mixed_values(values, *own, gates.weight, gates.offset)
    torch.testing.assert_close(one, expected[:, token : token + 1], rtol=0, atol=ROUNDING)


@settings(max_examples=25)
@given(
    st.integers(0, 100),
    lengths,
    st.sets(st.integers(1, 59), max_size=3),
    st.sets(st.integers(1, 59), max_size=6),
)
def test_a_carried_sum_gives_the_same(
    seed: int, length: int, begins: set[int], cuts: set[int]
) -> None:
    """In calls of any lengths, single tokens among them; documents may begin in any."""
    values, x, gates = some(seed, length)
    allowed = documents(length, begins, length)
    count = allowed.sum(-1)
    expected = naive_mix(values, allowed, x, gates).float()
    past = torch.zeros(2, KV_HEADS, MIX_REACH, SIZE)
    total = torch.zeros(2, KV_HEADS, 1, SIZE)
    ends = sorted({cut for cut in cuts if cut < length} | {length})
    start, parts = 0, []
    for end in ends:
        new = values[:, :, start:end]
        own = (count[:, start:end], past, total, x[:, start:end], gates.weight, gates.offset)
        made, total = carried_mix(new, *own)
        parts.append(made)
        past = torch.cat([past, new], 2)[:, :, -MIX_REACH:]
        start = end
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("length", [1, 5])
def test_padding_gives_zeros(length: int) -> None:
    """Tokens that attend to nothing; their results are finite, and read by nobody."""
    values, x, gates = some(0, length)
    count, positions = torch.zeros(2, length, dtype=torch.long), torch.arange(length)
    made = mixed_values(values, positions, count, x, gates.weight, gates.offset)
    assert torch.equal(made, torch.zeros_like(made))
    past, total = torch.ones(2, KV_HEADS, MIX_REACH, SIZE), torch.ones(2, KV_HEADS, 1, SIZE)
    made, total = carried_mix(values, count, past, total, x, gates.weight, gates.offset)
    assert torch.equal(made, torch.zeros_like(made))
    assert torch.equal(total, torch.zeros_like(total))
