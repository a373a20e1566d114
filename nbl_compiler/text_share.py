"""Whose part of the text a process goes through."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized

from torch import Tensor

from nbl_compiler.batches import Batch
from nbl_compiler.errors import CalibrationError
from nbl_compiler.recoded_text import Recoded, WithRecoded
from nbl_compiler.several_processes import Share

Passage = Batch | Recoded
"""What a pass over text goes through: a batch, as it is or recoded."""


def tokens_of(batch: Passage) -> int:
    """Return how many tokens a batch holds, padding included."""
    if isinstance(batch, Recoded):
        return tokens_of(batch.batch)
    if isinstance(batch, Tensor):
        return batch.shape[:2].numel()  # ids [T] or [B, T], or embedded tokens [B, T, d]
    values = batch.values() if isinstance(batch, Mapping) else batch
    first = next((v for v in values if isinstance(v, Tensor)), None)
    return 0 if first is None else first.shape[:2].numel()


class OwnText:
    """The batches that were given to this process, its own alone.

    Args:
        batches: To go through, several times if it is no iterator.
        processes: How many such texts there are.
        recoded: Go through some of them a second time, recoded (``WithRecoded``).
    """

    def __init__(self, batches: Iterable[Batch], processes: int, *, recoded: bool = False) -> None:
        self._batches, self._processes = batches, processes
        self._passages = WithRecoded(batches) if recoded else batches

    def __iter__(self) -> Iterator[Passage]:
        return iter(self._passages)

    @property
    def length(self) -> int | None:
        """How many batches there are, if that is known."""
        return length_of(self._passages)

    def first(self, tokens: int) -> list[Passage]:
        """Return the first batches; those of all processes hold about this many tokens."""
        return _first(self._passages, tokens // self._processes)

    def with_recoded(self) -> OwnText:
        """Return this text, some of it recoded besides."""
        return OwnText(self._batches, self._processes, recoded=True)


class SharedText:
    """This process's share of batches that all processes were given.

    Args:
        batches: All of them.
        share: Which are this process's.
        recoded: Go through some of them a second time, recoded (``WithRecoded``).

    Raises:
        CalibrationError: if there are too few for a batch each.
    """

    def __init__(self, batches: Sequence[Batch], share: Share, *, recoded: bool = False) -> None:
        if len(batches) < share.count:
            error = CalibrationError(
                f"the text has {len(batches)} batch(es) to fit on, for {share.count} processes; "
                "give more tokens, fewer rows a batch, or start fewer processes"
            )
            error.told_by = 0  # all processes were given the same
            raise error
        self._batches, self._share = batches, share
        self._passages: list[Passage] = list(WithRecoded(batches) if recoded else batches)

    def __iter__(self) -> Iterator[Passage]:
        return iter(self._of(self._passages))

    @property
    def length(self) -> int:
        """How many batches are this process's."""
        return len(self._of(self._passages))

    def first(self, tokens: int) -> Sequence[Passage]:
        """Return this process's batches among the first, which hold this many tokens together."""
        return self._of(_first(self._passages, tokens))

    def with_recoded(self) -> SharedText:
        """Return this text, some of it recoded besides."""
        return SharedText(self._batches, self._share, recoded=True)

    def _of(self, passages: Sequence[Passage]) -> Sequence[Passage]:
        return passages[self._share.index :: self._share.count]


Text = OwnText | SharedText


def text_of(batches: Iterable[Batch], share: Share, *, shared: bool, again: bool) -> Text:
    """Return what this process goes through.

    Args:
        batches: What it was given.
        share: Which batches it takes of a text that all processes were given.
        shared: Whether this is one.
        again: Whether the text is gone through several times (an iterator's batches are kept).
    """
    if shared and share.count > 1:
        return SharedText(list(batches), share)
    kept = list(batches) if again and iter(batches) is batches else batches
    return OwnText(kept, share.count)


def length_of(batches: Iterable[Passage]) -> int | None:
    """Return how many batches this process goes through, if that is known."""
    if isinstance(batches, OwnText | SharedText | WithRecoded):
        return batches.length
    return len(batches) if isinstance(batches, Sized) else None


def _first(batches: Iterable[Passage], tokens: int) -> list[Passage]:
    """Return the first batches that hold this many tokens together, at least one."""
    taken: list[Passage] = []
    seen = 0
    for batch in batches:
        if taken and seen >= tokens:
            break
        taken.append(batch)
        seen += tokens_of(batch)
    return taken
