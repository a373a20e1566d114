"""What contenders are made of: a model, with text or without."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bench.shapes import SHAPES, build
from nbl_compiler.evaluation.perplexity import evaluation_rows
from nbl_compiler.models import load_causal
from nbl_compiler.text import PYTHON_DOCS, TextSource, python_docs_parts, token_batches

Made = TypeVar("Made")
TINY = "tiny"
"""A tiny model with random weights, and random tokens for text: to try the benchmark out."""


@dataclass
class Subject:
    """A model that contenders are made of.

    Args:
        name: In the results.
        model: Dense, in eval mode.
        batches: Text to calibrate on; none for a shape with random weights.
        rows: Text to judge by, ids [1, T] or model inputs.
        most: The largest fraction of attention layers that will be asked for.
        checked: Whose compiled form was compared with its uncompiled one, and where.
    """

    name: str
    model: Any
    batches: list[Any] = field(default_factory=list, repr=False)
    rows: list[Any] = field(default_factory=list, repr=False)
    most: float = 0.5
    checked: set[tuple[str, ...]] = field(default_factory=set, repr=False)
    _known: dict[str, tuple[Any, float]] = field(default_factory=dict, init=False, repr=False)

    @property
    def random(self) -> bool:
        """Whether the weights mean nothing, so that there is nothing to calibrate."""
        return not self.batches

    def remember(self, key: str, make: Callable[[], Made]) -> tuple[Made, float]:
        """Return what ``make`` makes, and the seconds that it took when it was first asked for."""
        if key not in self._known:
            started = time.perf_counter()
            value = make()
            self._known[key] = value, time.perf_counter() - started
        return self._known[key]

    def forget(self, key: str) -> None:
        """Let go of what was made under a key."""
        self._known.pop(key, None)


def decoder(name: str, args: argparse.Namespace, dtype: str = "float32") -> Subject:
    """Return a decoder with its text: pretrained, ``tiny``, or of a published shape."""
    if name in SHAPES:
        return Subject(name, build(name, dtype))
    if name == TINY:
        return _tiny(args)
    model, tokenizer = load_causal(name, dtype)
    known, unseen = documents(args)
    batches = token_batches(known, tokenizer, tokens=args.tokens)
    rows = evaluation_rows(unseen, tokenizer, tokens=args.eval_tokens)
    return Subject(name, model, batches, rows)


def documents(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Return the texts to calibrate on and to judge by; python-docs is divided between both."""
    if args.text == args.eval_text == PYTHON_DOCS:
        return python_docs_parts()
    return list(TextSource(args.text).documents()), list(TextSource(args.eval_text).documents())


def _tiny(args: argparse.Namespace) -> Subject:
    model = build("tiny-shape")
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for weight in model.parameters():  # at a size at which every layer matters
            if weight.ndim == 2:
                noise = torch.randn(weight.shape, generator=generator)
                weight.copy_(noise * (2.0 / weight.shape[1] ** 0.5))

    def ids(count: int, batch: int) -> list[Tensor]:
        vocabulary = model.config.vocab_size
        length = 64
        many = torch.randint(0, vocabulary, (max(count // length, 4), length), generator=generator)
        return list(many.split(batch))

    return Subject(TINY, model, ids(args.tokens, 4), ids(args.eval_tokens, 1))


def vocabulary_size(model: nn.Module) -> int:
    """Return the number of tokens."""
    return int(model.config.get_text_config().vocab_size)


def inputs_of(row: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a row as model inputs."""
    return {"input_ids": row} if isinstance(row, Tensor) else dict(row)
