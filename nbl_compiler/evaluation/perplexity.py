"""Perplexity of a causal LM on rows of text."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbl_compiler.errors import ConfigError
from nbl_compiler.plans import Plan
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
    return [
        row.ids for row in rows_of_documents(documents, tokenizer, tokens=tokens, length=length)
    ]


@dataclass(frozen=True)
class Row:
    """One row of evaluation text.

    Args:
        ids: Token ids [1, T].
        document: Index of the document that it begins in.
    """

    ids: Tensor
    document: int


def rows_of_documents(
    documents: Iterable[str], tokenizer: Any, *, tokens: int, length: int = 512
) -> list[Row]:
    """Return :func:`evaluation_rows` together with the document that each row begins in.

    Raises:
        ConfigError: if the text is shorter than one row.
    """
    ids: list[int] = []
    starts: list[int] = []
    for document in documents:
        starts.append(len(ids))
        ids.extend(tokenizer(document, add_special_tokens=False, truncation=False)["input_ids"])
        if len(ids) >= tokens:
            break
    rows: list[Row] = []
    read = 0
    for row in opened_rows(ids, tokenizer, length):
        if len(row) == length:
            rows.append(Row(torch.tensor([row]), bisect_right(starts, read) - 1))
        read += len(row) - (row[0] != ids[read])  # an added BOS is not of the text
    if not rows:
        raise ConfigError(f"the evaluation text has {len(ids)} tokens; one row needs {length}")
    return rows[: max(tokens // length, 1)]


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


def perplexity_of(
    model: nn.Module, tokenizer: Any, plan: Plan, documents: Iterable[str], tokens: int
) -> float:
    """Return the perplexity under one plan, without lowering (quality does not depend on it)."""
    rows = evaluation_rows(documents, tokenizer, tokens=tokens)
    options: dict[str, Any] = {"plan": plan, "lowering": "eager"}
    forward = torch.compile(model, backend="nbl", options=options)
    return perplexity(forward, rows).perplexity
