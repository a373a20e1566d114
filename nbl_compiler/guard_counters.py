"""Counters of a guarded FFN, kept on the device and read when the user asks.

``accumulate`` is made of plain tensor operations on a tensor that lives as long as the compiled
model: it traces, fuses, and never waits for the device. Only ``read`` does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

FIELDS = 4
"""Tokens, flagged neurons, most flagged neurons of a token, tokens on the dense path."""


class PerToken:
    """What follows from counts of tokens: ``tokens``, ``outliers``, ``dense_tokens``."""

    tokens: int
    outliers: int
    dense_tokens: int

    @property
    def outliers_per_token(self) -> float:
        """Mean number of flagged neurons per token; 0 without tokens."""
        return self.outliers / self.tokens if self.tokens else 0.0

    @property
    def dense_share(self) -> float:
        """Share of tokens on the dense path; 0 without tokens."""
        return self.dense_tokens / self.tokens if self.tokens else 0.0


@dataclass(frozen=True)
class GuardCounts(PerToken):
    """What a guarded FFN did since its counters were made or reset.

    Args:
        tokens: Tokens seen.
        outliers: Neurons flagged, over all tokens.
        most_outliers: Most neurons flagged for one token.
        dense_tokens: Tokens that took the dense path.
    """

    tokens: int
    outliers: int
    most_outliers: int
    dense_tokens: int

    def __add__(self, other: GuardCounts) -> GuardCounts:
        return GuardCounts(
            self.tokens + other.tokens,
            self.outliers + other.outliers,
            max(self.most_outliers, other.most_outliers),
            self.dense_tokens + other.dense_tokens,
        )


def new_counters(device: torch.device | str = "cpu") -> Tensor:
    """Return counters at zero: int64 [4] on ``device``."""
    return torch.zeros(FIELDS, dtype=torch.int64, device=device)


def accumulate(counters: Tensor, outliers: Tensor, dense: Tensor) -> None:
    """Add what one call of the op reports.

    Args:
        counters: From :func:`new_counters`; changed in place.
        outliers: The op's second result, int32 [tokens].
        dense: The op's third result, bool [tokens].
    """
    padded = F.pad(outliers.to(torch.int64), (0, 1))  # no tokens have a maximum, too
    counters.copy_(
        torch.stack(
            [
                counters[0] + outliers.shape[0],
                counters[1] + padded.sum(),
                torch.maximum(counters[2], padded.max()),
                counters[3] + dense.sum(),
            ]
        )
    )


def read(counters: Tensor) -> GuardCounts:
    """Return the counts; waits for the device."""
    return GuardCounts(*counters.tolist())
