"""Which batches a process goes through."""

from __future__ import annotations

import pytest
import torch

from nbl_compiler.errors import CalibrationError
from nbl_compiler.several_processes import Share
from nbl_compiler.text_share import OwnText, SharedText, length_of, text_of, tokens_of

BATCHES = [torch.full((2, 10), number) for number in range(7)]  # of 20 tokens


def numbers(batches: object) -> list[int]:
    return [int(batch[0, 0]) for batch in batches]  # type: ignore[attr-defined]


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_every_batch_has_one_process(processes: int) -> None:
    texts = [
        text_of(BATCHES, Share(i, processes), shared=True, again=True) for i in range(processes)
    ]
    assert sorted(n for text in texts for n in numbers(text)) == list(range(7))
    assert sum(length_of(text) or 0 for text in texts) == 7


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_the_first_tokens_are_the_same_whoever_has_them(processes: int) -> None:
    shares = [Share(i, processes) for i in range(processes)]
    texts = [text_of(BATCHES, share, shared=True, again=True) for share in shares]
    assert sorted(n for text in texts for n in numbers(text.first(50))) == [0, 1, 2]


def test_of_texts_of_their_own_each_gives_its_part_of_the_first_tokens() -> None:
    assert numbers(OwnText(BATCHES, 2).first(80)) == [0, 1]
    assert numbers(OwnText(BATCHES, 2).first(1)) == [0]  # at least one batch


def test_the_batches_of_an_iterator_are_kept_where_they_are_needed_again() -> None:
    text = text_of(iter(BATCHES), Share(0, 2), shared=False, again=True)
    assert numbers(text) == numbers(text) == list(range(7))
    assert length_of(text_of(iter(BATCHES), Share(0, 2), shared=False, again=False)) is None


def test_fewer_batches_than_processes_are_refused() -> None:
    with pytest.raises(CalibrationError, match=r"the text has 7 batch\(es\) to fit on, for 8 proc"):
        SharedText(BATCHES, Share(0, 8))


def test_tokens_are_counted_with_their_padding() -> None:
    assert tokens_of(BATCHES[0]) == 20
    assert tokens_of({"other": 1, "input_ids": BATCHES[0]}) == 20
    assert tokens_of(torch.zeros(2, 10, 4)) == 20
    assert tokens_of({}) == 0
