"""Quality: perplexity on text that calibration never saw, and agreement with the dense model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nbl_compiler.errors import ConfigError
from nbl_compiler.progress import token_bar
from nbl_compiler.text import opened_rows


@dataclass(frozen=True)
class Quality:
    """How well a causal model predicts text.

    Args:
        loss: Mean cross-entropy of the next token, in nats.
        tokens: Number of predicted tokens.
    """

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))


def evaluation_rows(
    documents: Iterable[str], tokenizer: Any, *, tokens: int, length: int = 512
) -> list[Tensor]:
    """Cut text into rows of ``length`` tokens, each opened by the BOS token where there is one.

    Args:
        documents: Texts, taken in order and joined.
        tokenizer: A transformers tokenizer.
        tokens: Number of tokens wanted, at most.
        length: Tokens a row, BOS included.

    Returns:
        Tensors of ids [1, length].

    Raises:
        ConfigError: if the text is shorter than one row.
    """
    ids: list[int] = []
    for document in documents:
        ids.extend(tokenizer(document, add_special_tokens=False, truncation=False)["input_ids"])
        if len(ids) >= tokens:
            break
    rows = [row for row in opened_rows(ids, tokenizer, length) if len(row) == length]
    if not rows:
        raise ConfigError(f"the evaluation text has {len(ids)} tokens; one row needs {length}")
    return [torch.tensor([row]) for row in rows[: max(tokens // length, 1)]]


def perplexity(
    forward: Callable[..., Any], rows: Iterable[Tensor], *, progress: bool = False
) -> Quality:
    """Measure the next-token loss of a causal LM, without a KV cache.

    Args:
        forward: The model, compiled or not.
        rows: Token ids [B, T].
        progress: Show a bar.
    """
    rows = list(rows)
    total, count = 0.0, 0
    with torch.no_grad(), token_bar(len(rows), "evaluating", progress) as bar:
        for ids in rows:
            logits = forward(input_ids=ids, use_cache=False).logits[:, :-1].float()
            target = ids[:, 1:]
            total += float(F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum"))
            count += target.numel()
            bar(target.numel())
    return Quality(total / count, count)
