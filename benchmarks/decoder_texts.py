"""What most benchmarks here start from: a decoder, text to calibrate on, other text to judge by.

Every one of them takes the same arguments for these, and gets the same text for the same arguments.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor
from without_bos import WithoutBOS

from nbl_compiler.evaluation.perplexity import perplexity_of
from nbl_compiler.models import load_causal
from nbl_compiler.plans import Plan
from nbl_compiler.text import TextSource, token_batches


def arguments(
    description: str | None, tokens: int, eval_tokens: int | None = None
) -> argparse.ArgumentParser:
    """Return a parser for the model and its texts.

    Args:
        description: Of the benchmark.
        tokens: How many to calibrate on, unless told otherwise.
        eval_tokens: How many to judge by, or None where no other text is needed.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--text", default="python-docs")
    parser.add_argument("--tokens", type=int, default=tokens)
    parser.add_argument("--without-bos", action="store_true", help="no row opens with BOS")
    if eval_tokens is not None:
        parser.add_argument("--eval-text", default="python-docs")
        parser.add_argument("--eval-tokens", type=int, default=eval_tokens)
    return parser


@dataclass
class Subject:
    """A decoder with its texts.

    Args:
        model: In eval mode.
        tokenizer: Its own, or one that adds no BOS.
        args: The arguments.
    """

    model: Any
    tokenizer: Any
    args: argparse.Namespace = field(repr=False)

    @cached_property
    def text(self) -> list[str]:
        """The calibration text, by documents."""
        return list(TextSource(self.args.text).documents())

    def batches(self, tokens: int | None = None) -> list[Tensor]:
        """Return token ids to calibrate on."""
        return list(token_batches(self.text, self.tokenizer, tokens=tokens or self.args.tokens))

    @cached_property
    def documents(self) -> list[str]:
        """Text that calibration never sees."""
        return list(TextSource(self.args.eval_text).documents())

    def perplexity(self, plan: Plan) -> float:
        """Return perplexity at 512 tokens, float32, on that text.

        Args:
            plan: Without rewritten sites for the dense model.
        """
        return perplexity_of(
            self.model, self.tokenizer, plan, self.documents, self.args.eval_tokens
        )


def load(args: argparse.Namespace) -> Subject:
    """Load what the arguments name."""
    model, tokenizer = load_causal(args.model)
    return Subject(model, WithoutBOS(tokenizer) if args.without_bos else tokenizer, args)
