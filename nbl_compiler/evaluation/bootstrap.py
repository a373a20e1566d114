"""Confidence intervals of sums over documents, by the bootstrap (Efron 1979).

Tokens of one document are alike, so whole documents are drawn, never single tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DRAWS = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A figure with its confidence interval.

    Args:
        value: On all text.
        low: Lower end of the interval.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def estimate(sums: Tensor, statistic: Callable[[Tensor], Tensor], seed: int = 0) -> Estimate:
    """Return a statistic of the totals, and the interval that ``LEVEL`` of the draws fall into.

    Args:
        sums: What each of U units (documents) adds up to, [U, k] float64.
        statistic: Totals [..., k] → figure [...].
        seed: Of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(sums), (DRAWS, len(sums)), generator=generator)
    # How often each unit was drawn: [DRAWS, U] @ [U, k] instead of gathering [DRAWS, U, k].
    times = torch.zeros(DRAWS, len(sums), dtype=sums.dtype)
    times.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=sums.dtype))
    tail = (1 - LEVEL) / 2
    ends = torch.tensor([tail, 1 - tail], dtype=sums.dtype)
    low, high = statistic(times @ sums).quantile(ends).tolist()
    return Estimate(float(statistic(sums.sum(0))), low, high)
