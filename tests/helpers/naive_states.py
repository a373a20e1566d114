"""Value states by their definition: a loop over tokens, and over the positions each attends to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nbl_compiler.value_states import BUCKETS, DECAY, Gates, States


def naive_states(values: Tensor, allowed: Tensor, states: States) -> Tensor:
    """Return the states [B, T, vectors · H · D] of a whole sequence.

    Args:
        values: [B, H, T, D].
        allowed: Which positions (columns) each token attends to, [B or 1, T, T], bool.
        states: Which ones.
    """
    batch, heads, length, width = values.shape
    result = values.new_zeros((batch, length, states.vectors, heads, width), dtype=torch.float64)
    exact = values.double()
    for row in range(batch):
        for token in range(length):
            reach = allowed[row % allowed.shape[0], token].nonzero().view(-1).tolist()
            vectors = [
                exact[row, :, token - lag]
                if token - lag in reach
                else torch.zeros(heads, width, dtype=torch.float64)
                for lag in range(1, states.taps + 1)
            ]
            if states.averages:
                weights = [(DECAY ** (token - position), position) for position in reach]
                total = sum(weight for weight, _ in weights) or 1.0
                zero = torch.zeros(heads, width, dtype=torch.float64)
                vectors.append(sum((w * exact[row, :, p] for w, p in weights), zero) / total)
                vectors.append(sum((exact[row, :, p] for p in reach), zero) / max(len(reach), 1))
            result[row, token] = torch.stack(vectors)
    return result.flatten(2)


def naive_mix(values: Tensor, allowed: Tensor, x: Tensor, gates: Gates) -> Tensor:
    """Return mixed values [B, T, heads · D] of a whole sequence.

    Args:
        values: [B, H, T, D].
        allowed: Which positions (columns) each token attends to, [B or 1, T, T], bool.
        x: Hidden states, [B, T, d].
        gates: Of the site.
    """
    batch, kv_heads, length, width = values.shape
    heads = gates.weight.shape[0]
    result = torch.zeros(batch, length, heads, width, dtype=torch.float64)
    for row in range(batch):
        for token in range(length):
            reach = allowed[row % allowed.shape[0], token].nonzero().view(-1).tolist()
            scores = gates.weight.double() @ x[row, token].double() + gates.offset.double()
            groups = [
                [p for p in reach[1:] if first <= token - p <= (length if last is None else last)]
                for first, last in BUCKETS
            ]
            shares = [scores[:, 0].exp()]
            shares += [len(g) * scores[:, i].exp() for i, g in enumerate(groups, start=1)]
            total = sum(shares[1:], shares[0])
            for share, group in zip(shares[1:], groups, strict=True):
                if group:
                    mean = values[row, :, group].double().mean(1)
                    of_heads = mean.repeat_interleave(heads // kv_heads, 0)
                    result[row, token] += (share / total)[:, None] * of_heads
    return result.flatten(2)


class _Captured(TorchFunctionMode):
    """Takes down the values and the mask of scaled dot-product attention."""

    def __init__(self) -> None:
        super().__init__()
        self.values: Tensor | None = None
        self.allowed: Tensor | None = None

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is F.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
            self.values = given["value"]
            self.allowed = _allowed(given.get("attn_mask"), self.values.shape[2])
        return function(*args, **(kwargs or {}))


@contextmanager
def captured_attention() -> Iterator[_Captured]:
    """Take down what the attention that runs inside mixes, and who attends to whom."""
    with _Captured() as capture:
        yield capture


def _allowed(mask: Tensor | None, length: int) -> Tensor:
    if mask is None:
        return torch.ones(1, length, length, dtype=torch.bool).tril()
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return allowed.any(1)
