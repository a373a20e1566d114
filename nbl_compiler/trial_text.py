"""The text of trials: rows that no map was fitted on, as they are, repeated, and recoded; and rows
that the model writes itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nbl_compiler.batches import cheap_arguments
from nbl_compiler.recoded_text import can_be_edited, ordinary_tokens
from nbl_compiler.recoded_text import recoded as recoded_rows
from nbl_compiler.written_text import can_write
from nbl_compiler.written_text import written as written_rows

# Tokens a trial, and how many of their positions are compared: the LM head is the dearest part.
# Fewer tokens make the order a matter of luck.
TRIAL_TOKENS = 2048
TRIAL_POSITIONS = 512
# As it is, repeated, recoded, and written by the model.
MOST_KINDS = 4


@dataclass(frozen=True)
class Part:
    """Some rows of one batch.

    Args:
        inputs: The model's inputs.
        keep: Number of flat positions of the logits → indices (or mask) of those to compare; None
            for all.
    """

    inputs: dict[str, Any]
    keep: Callable[[int], Tensor] | None = None


def kinds_of_text(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    tokens: int = TRIAL_TOKENS,
    *,
    other: bool = True,
) -> list[list[Part]]:
    """Return text as it is and, where it can be edited, repeated and recoded, and written.

    Args:
        model: That is tried.
        batches: Text that no map was fitted on.
        tokens: How many of each kind, at most.
        other: Also take text of quite other kinds, which a decoder writes.
    """
    natural = few_rows(model, batches, tokens)
    plain = [part for part in natural if can_be_edited(part.inputs)]
    if not plain:
        return [natural]
    kinds = [natural, [*map(repeated, plain)], [recoded(model, part) for part in plain]]
    if other and can_write(model):
        kinds.append(written(model, plain))
    return kinds


def repeated(part: Part) -> Part:
    """Return half of the part's rows, the second half of each a repetition of the first.

    The opening token is not repeated; only what follows the repeated tokens is compared.
    """
    ids = part.inputs["input_ids"]
    length = ids.shape[1]
    half = -(-length // 2)
    again = torch.cat([ids[:, : half + 1], ids[:, 1 : length - half]], 1)
    rows, first = -(-ids.shape[0] // 2), half + 1
    inputs = {
        name: value[:rows] if isinstance(value, Tensor) and name != "logits_to_keep" else value
        for name, value in part.inputs.items()
    }
    inputs["input_ids"] = again[:rows]
    kept = inputs.get("logits_to_keep")
    if isinstance(kept, Tensor):
        inputs["logits_to_keep"] = kept[kept >= first]
        return Part(inputs)
    chosen = torch.arange(ids.numel()) if part.keep is None else part.keep(ids.numel())
    chosen = chosen[(chosen < rows * length) & (chosen % length >= first)]
    return Part(inputs, lambda _: chosen)


def recoded(model: nn.Module, part: Part) -> Part:
    """Return the part's rows, recoded."""
    ids = part.inputs["input_ids"]
    return _with_ids(part, recoded_rows(ids, ordinary_tokens(model, ids)))


def written(model: nn.Module, parts: Sequence[Part]) -> list[Part]:
    """Return as many rows as the parts have, written by the model."""
    rows = written_rows(model, [part.inputs["input_ids"] for part in parts])
    return [_with_ids(part, ids) for part, ids in zip(parts, rows, strict=True)]


def _with_ids(part: Part, ids: Tensor) -> Part:
    return replace(part, inputs={**part.inputs, "input_ids": ids})


def few_rows(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], tokens: int = TRIAL_TOKENS
) -> list[Part]:
    """Return inputs of about as many tokens, and which positions to compare."""
    left, compared = tokens, TRIAL_POSITIONS * tokens / TRIAL_TOKENS
    parts: list[Part] = []
    sizes = [_main(batch).shape[:2] for batch in batches]
    total = min(sum(shape.numel() for shape in sizes), tokens)
    for batch, shape in zip(batches, sizes, strict=True):
        rows = min(max(left // max(shape[1], 1), 0 if parts else 1), shape[0])
        if rows:
            share = rows * shape[1] / max(total, 1)
            parts.append(_part(model, batch, rows, max(int(compared * share), 1)))
            left -= rows * shape[1]
    return parts


def _main(batch: Mapping[str, Any]) -> Tensor:
    return next(v for v in batch.values() if isinstance(v, Tensor))


def _part(model: nn.Module, batch: Mapping[str, Any], rows: int, positions: int) -> Part:
    main = _main(batch)
    inputs = {
        k: v[:rows] if isinstance(v, Tensor) and v.shape[:1] == main.shape[:1] else v
        for k, v in batch.items()
    }
    cheap = cheap_arguments(model)
    if "use_cache" in cheap:
        inputs["use_cache"] = False
    length, device = main.shape[1], main.device
    mask = inputs.get("attention_mask")
    if "logits_to_keep" in cheap:
        kept = torch.arange(0, length, max(rows * length // positions, 1), device=device)
        inputs["logits_to_keep"] = kept
        real = None if mask is None else mask[:, kept].flatten().bool()
        return Part(inputs, None if real is None else lambda _: real)
    every = max(rows * length // positions, 1)
    if mask is None:
        return Part(inputs, lambda count: torch.arange(0, count, every, device=device))
    return Part(inputs, lambda count: mask.flatten().nonzero().view(-1)[::every])
