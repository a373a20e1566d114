"""Rows of text without BOS in front, for figures that others measured so."""

from __future__ import annotations

from typing import Any


class WithoutBOS:
    """A tokenizer that adds no special tokens: rows begin in the middle of a text.

    The first token of a row then takes the place of BOS, which attention sinks into. Figures of
    others are often measured so.
    """

    bos_token_id = None

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, text: str, **options: Any) -> dict[str, Any]:
        """Return the ids of a text alone."""
        ids: dict[str, Any] = self._tokenizer(text, **{**options, "add_special_tokens": False})
        return ids

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)
