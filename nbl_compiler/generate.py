"""Greedy generation with a static cache: the same loop for dense and compiled models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def greedy(
    forward: Callable[..., Any], ids: Tensor, cache: Any, new_tokens: int, stop: int | None = None
) -> Tensor:
    """Extend a prompt by the most likely tokens.

    Args:
        forward: The model, compiled or not.
        ids: Prompt [1, T].
        cache: A transformers cache with room for T + new_tokens positions.
        new_tokens: Number of tokens to add, at most.
        stop: End early after this token.

    Returns:
        The new tokens, [1, at most new_tokens].
    """
    made: list[Tensor] = []
    step = ids
    with torch.no_grad():
        for _ in range(new_tokens):
            logits = forward(input_ids=step, past_key_values=cache).logits
            step = logits[:, -1:].argmax(-1)
            made.append(step)
            if stop is not None and int(step) == stop:
                break
    return torch.cat(made, dim=1) if made else ids[:, :0]
