"""Progress bars for long work: tokens, seconds, and the estimated rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm


@contextmanager
def token_bar(batches: int | None, text: str, shown: bool) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the number of tokens of every finished batch."""
    tokens = 0
    with tqdm(total=batches, desc=text, unit="batch", disable=not shown) as bar:

        def advance(count: int) -> None:
            nonlocal tokens
            tokens += count
            bar.set_postfix_str(f"{tokens:,} tokens", refresh=False)
            bar.update(1)

        yield advance
