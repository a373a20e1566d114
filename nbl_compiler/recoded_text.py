"""Recoded text: each row's most frequent tokens are others, the same all along the row.

A map that was fitted on one kind of text alone relies on its conventions: which tokens are commas
and articles, and what follows them. Recoded rows have conventions of their own. Maps with mixed
values are fitted on some of these besides the text as it is (``WithRecoded``), and maps of
attention are tried on others (``trial_text.py``).

The others come from the whole vocabulary. With those of the same text, layers that pick up a text's
conventions looked as harmless as on the text itself.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nbl_compiler.batches import Batch
from nbl_compiler.models import text_config

# Rows of fewer tokens say nothing when they are repeated or recoded.
MIN_EDITED = 16
# How many tokens of a row's vocabulary are replaced: punctuation, articles, the words of its topic.
# With 8 the last layers, which pick up a text's conventions, still looked harmless.
RECODED_TOKENS = 32
# Every how many batches one is gone through a second time, recoded.
EVERY = 2


def can_be_edited(inputs: Mapping[str, Any]) -> bool:
    """Tell whether inputs are rows of token ids without padding, of more than a few tokens."""
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    whole = not isinstance(mask, Tensor) or bool(mask.all())
    return isinstance(ids, Tensor) and ids.ndim == 2 and ids.shape[1] >= MIN_EDITED and whole


def ordinary_tokens(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the tokens that may stand for others: the vocabulary, without special tokens; those of
    the rows themselves where the model does not say.

    Args:
        model: Its configuration says.
        ids: Rows, [B, T].
    """
    size = getattr(text_config(model), "vocab_size", None)
    if not isinstance(size, int):
        own: Tensor = ids.unique()
        return own.cpu()
    kept = torch.ones(size, dtype=torch.bool)
    kept[[token for token in special_tokens(model) if token < size]] = False
    return kept.nonzero().view(-1)


def special_tokens(model: nn.Module) -> list[int]:
    """Return the tokens to which a model's configuration gives a meaning of their own: those that
    open, close or fill rows, or stand for an image."""
    found: set[Any] = set()
    for config in (getattr(model, "config", None), text_config(model)):
        for name, value in vars(config).items() if config is not None else ():
            if name.endswith(("_token_id", "_token_index")):
                found.update(value if isinstance(value, list) else [value])
    return sorted(token for token in found if isinstance(token, int) and token >= 0)


def recoded(ids: Tensor, tokens: Tensor) -> Tensor:
    """Return rows with the most frequent tokens of each replaced by others.

    The opening token stays. What stands for what depends on the rows alone.

    Args:
        ids: [B, T].
        tokens: What may stand for others, [n].
    """
    rows = ids.cpu()
    seed = zlib.crc32(rows.contiguous().numpy().tobytes())
    generator = torch.Generator().manual_seed(seed)
    changed = rows.clone()
    for row, new in zip(rows[:, 1:], changed[:, 1:], strict=True):
        seen, counts = row.unique(return_counts=True)
        frequent = seen[counts.argsort(descending=True, stable=True)[:RECODED_TOKENS]]
        others = tokens[torch.randperm(len(tokens), generator=generator)[: len(frequent)]]
        for old, other in zip(frequent, others, strict=False):
            new[row == old] = other
    return changed.to(ids.device)


@dataclass(frozen=True)
class Recoded:
    """A batch to be gone through recoded, where that can be done.

    Args:
        batch: As it is.
    """

    batch: Batch

    def inputs(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any] | None:
        """Return the batch's inputs recoded, or None if they cannot be.

        Args:
            model: That gets them.
            inputs: Of the batch as it is.
        """
        if not can_be_edited(inputs):
            return None
        ids = inputs["input_ids"]
        changed = recoded(ids, ordinary_tokens(model, ids))
        # What feeds the decoder may be the same rows.
        return {name: changed if value is ids else value for name, value in inputs.items()}


class WithRecoded:
    """Batches, every second of them followed by itself, recoded.

    Args:
        batches: As they are.
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Batch | Recoded]:
        for number, batch in enumerate(self._batches):
            yield batch
            if number % EVERY == 0:
                yield Recoded(batch)

    @property
    def length(self) -> int | None:
        """How many there are, if that is known."""
        if not isinstance(self._batches, Sized):
            return None
        return len(self._batches) + -(-len(self._batches) // EVERY)
