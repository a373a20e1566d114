"""How many query heads a site has, told from what its attention mixed."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def query_heads(mixed: Tensor, values: Tensor) -> int:
    """Return the number of heads that mix values, each some head of the values.

    Args:
        mixed: What attention mixed, [B, heads, T, D] or [B · heads, T, D].
        values: The new values, [B, H, T, D].
    """
    size: Any = mixed.numel() // (values.shape[0] * values.shape[2] * values.shape[3])
    return int(size)
