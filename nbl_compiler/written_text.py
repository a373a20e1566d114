"""Text that the model writes itself: a sample of everything that it was pretrained on.

Calibration text is of one kind, and rarely of the kind that the model will see later. What a model
writes from nothing but the opening of a row is of many: prose, lists, code, other languages. It
needs no data (LLM-QAT calibrates quantization on such text, arXiv 2305.17888), and trials on it
tell what a map costs on other text (``trial_text.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nbl_compiler.recoded_text import special_tokens

PIECE = 128
"""Tokens that are written in one go. Longer rows hold several pieces: that takes fewer steps and
gives more kinds of text."""


def can_write(model: Any) -> bool:
    """Tell whether a model is a decoder that generates from token ids."""
    able = getattr(model, "can_generate", None)
    config = getattr(model, "config", None)
    return callable(able) and able() and not getattr(config, "is_encoder_decoder", False)


def written(model: Any, rows: Sequence[Tensor]) -> list[Tensor]:
    """Return rows of the same shapes that the model writes, each from the same opening token.

    It samples from its own distribution, without special tokens. The result depends on the model
    and the openings alone.

    Args:
        model: A decoder, see ``can_write``.
        rows: Token ids, each [B, T] with T > 1.
    """
    piece = min(PIECE, max(ids.shape[1] for ids in rows))
    each = [-(-(ids.shape[1] - 1) // (piece - 1)) for ids in rows]
    openings = [ids[:, :1].repeat_interleave(n, 0) for ids, n in zip(rows, each, strict=True)]
    pieces = _sampled(model, torch.cat(openings), piece)[:, 1:]
    made = []
    for ids, own in zip(rows, pieces.split([len(o) for o in openings]), strict=True):
        batch, length = ids.shape
        made.append(torch.cat([ids[:, :1], own.reshape(batch, -1)[:, : length - 1]], 1))
    return made


def _sampled(model: Any, openings: Tensor, length: int) -> Tensor:
    """Return rows that continue openings [n, 1] to this length."""
    devices = [openings.device] if openings.is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        torch.manual_seed(0)
        sampled: Tensor = model.generate(
            openings,
            attention_mask=torch.ones_like(openings),
            # The model's own distribution, whatever its authors recommend to sample from.
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            num_beams=1,
            max_new_tokens=length - 1,
            min_new_tokens=length - 1,
            suppress_tokens=special_tokens(model) or None,
            pad_token_id=0,  # no row ends before the others
            disable_compile=True,
        )
    return sampled
