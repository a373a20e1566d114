"""Greedy generation by transformers, and the same logits from one pass without a cache."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from models.architectures import inputs
from torch import Tensor, nn

PROMPT, STEPS, BATCH = 6, 32, 3
CACHE_LENGTH = PROMPT + STEPS + 2
PADDING = (0, 2, 4)  # left padding of the three rows


def prompt(name: str, padded: bool = False) -> dict[str, Tensor]:
    """Return token ids [B, T] with their attention mask, or an encoder's inputs."""
    given = inputs(name, batch=BATCH, length=PROMPT)
    given.pop("decoder_input_ids", None)
    if "input_ids" in given:
        ids = given["input_ids"]
        mask = given["attention_mask"] = torch.ones_like(ids)
        for row, count in enumerate(PADDING if padded else ()):
            ids[row, :count], mask[row, :count] = 0, 0
    return given


def generate(model: nn.Module, given: dict[str, Tensor], steps: int = STEPS, **more: Any) -> Any:
    """Generate ``steps + 1`` tokens greedily, returning sequences and raw logits."""
    return model.generate(
        **given,
        max_new_tokens=steps + 1,
        min_new_tokens=steps + 1,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
        **more,
    )


def logits_of(
    model: nn.Module, sequences: Tensor, given: dict[str, Tensor], steps: int = STEPS
) -> Tensor:
    """Return the logits that chose every generated token, [B, steps + 1, V].

    One pass over the finished sequences, without a cache.
    """
    read = sequences[:, :-1]
    if model.config.is_encoder_decoder:
        return model(**given, decoder_input_ids=read, use_cache=False).logits[:, -steps - 1 :]
    mask = torch.cat([given["attention_mask"], given["attention_mask"].new_ones(BATCH, steps)], 1)
    more = {}
    if "position_ids" in inspect.signature(model.forward).parameters:
        more["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return model(input_ids=read, attention_mask=mask, use_cache=False, **more).logits[
        :, -steps - 1 :
    ]
