"""The last of a text is kept from the fit, for trials."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from nbl_compiler.batches import Batch, model_inputs
from nbl_compiler.text_pass import device_of
from nbl_compiler.text_share import tokens_of
from nbl_compiler.trial_text import TRIAL_TOKENS

# Share of the text that trials (``rank_by="loss"``) may keep from the fit.
MOST_ASIDE = 0.2


def all_but_last(
    model: nn.Module, batches: Iterable[Batch], aside: list[dict[str, Any]]
) -> Iterator[Batch]:
    """Yield the batches but the last few, which go ``aside``; a single batch serves both ends.

    Enough are held back for trials, if they are no more than ``MOST_ASIDE`` of all tokens.
    """
    held: deque[Batch] = deque()
    total = 0
    for batch in batches:
        held.append(batch)
        total += tokens_of(batch)
        while sum(map(tokens_of, held)) - tokens_of(held[0]) >= TRIAL_TOKENS:
            yield held.popleft()
    while len(held) > 1 and sum(map(tokens_of, held)) > MOST_ASIDE * total:
        yield held.popleft()
    aside.extend(model_inputs(model, batch, device_of(model)) for batch in held)
    if held and total == tokens_of(held[0]):
        yield held[0]
