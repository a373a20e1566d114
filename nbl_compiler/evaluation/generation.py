"""Greedy texts of the dense model and of a plan: where they part, and whether they repeat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from nbl_compiler.generate import greedy

REPEATED_TOKENS = 4
"""A run of so many tokens that occurred before in the same text counts as repeated."""


@dataclass(frozen=True)
class Generation:
    """What was generated from the same prompts.

    Args:
        prompts: How many.
        new_tokens: Tokens added to each.
        parted: Token at which the plan's text leaves the dense one, median over prompts
            (``new_tokens`` if it never does).
        same: Share of the prompts with the same text to the end.
        repeated: Share of repeated runs, (dense, under the plan).
    """

    prompts: int
    new_tokens: int
    parted: float
    same: float
    repeated: tuple[float, float]


def compare_generation(
    model: Any, nbl: Callable[..., Any], prompts: Tensor, new_tokens: int
) -> Generation:
    """Continue prompts greedily with both.

    Args:
        model: The dense model.
        nbl: The same, compiled with a plan.
        prompts: Token ids [B, T] without padding.
        new_tokens: Tokens to add.
    """
    texts = [
        greedy(forward, prompts, DynamicCache(config=model.config), new_tokens)
        for forward in (model, nbl)
    ]
    parted = [_first_difference(a, b) for a, b in zip(*texts, strict=True)]
    repeated = [sum(map(repetition, text.tolist())) / len(text) for text in texts]
    return Generation(
        prompts=len(prompts),
        new_tokens=new_tokens,
        parted=float(torch.tensor(parted, dtype=torch.float64).quantile(0.5)),
        same=sum(at == new_tokens for at in parted) / len(parted),
        repeated=(repeated[0], repeated[1]),
    )


def repetition(tokens: Sequence[int]) -> float:
    """Return the share of a text's runs of ``REPEATED_TOKENS`` tokens that occurred before."""
    runs = [
        tuple(tokens[i : i + REPEATED_TOKENS]) for i in range(len(tokens) - REPEATED_TOKENS + 1)
    ]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def _first_difference(a: Tensor, b: Tensor) -> int:
    different = (a != b).nonzero()
    return int(different[0]) if len(different) else len(a)
