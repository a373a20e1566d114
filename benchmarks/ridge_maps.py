"""Maps fitted by ridge regression on rows held in memory, and their error on held-out rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK, HELD_OUT = 128, 8  # every eighth block of 128 tokens is held out
RIDGES = (1e-4, 1e-3, 3e-3, 1e-2)

Products = tuple[Tensor, Tensor]
"""Σ x xᵀ [n, n] and Σ x yᵀ [n, d_out]."""


class Rows:
    """Rows [tokens, n] and targets [tokens, d_out], centred; some are fitted, others held out.

    Args:
        rows: x; changed in place.
        target: y.
    """

    def __init__(self, rows: Tensor, target: Tensor) -> None:
        held = torch.arange(len(target)) // BLOCK % HELD_OUT == HELD_OUT // 2
        rows -= rows[~held].mean(0)
        target = target - target[~held].mean(0)
        self.fit, self._test = (_products(rows[c], target[c]) for c in (~held, held))
        self._total = target[held].double().square().sum()

    def maps(self, columns: Sequence[int]) -> list[Tensor]:
        """Return the map [columns, d_out] of every ridge, from some columns of x."""
        index = torch.tensor(columns)
        scale = self.fit[0].diagonal()[index].sqrt().clamp_min(1e-9)
        gram = self.fit[0][index][:, index] / scale[:, None] / scale
        right = self.fit[1][index] / scale[:, None]
        unit = torch.eye(len(columns))
        return [torch.linalg.solve(gram + r * unit, right) / scale[:, None] for r in RIDGES]

    def error(self, columns: Sequence[int], weight: Tensor) -> float:
        """Return the held-out NMSE of a map."""
        index = torch.tensor(columns)
        error = self._total - 2 * (weight * self._test[1][index]).sum()
        square = (weight * (self._test[0][index][:, index] @ weight)).sum()
        return float((error + square) / self._total)

    def least(self, columns: Sequence[int]) -> float:
        """Return the held-out NMSE of the best ridge."""
        return min(self.error(columns, weight) for weight in self.maps(columns))


def _products(x: Tensor, y: Tensor) -> Products:
    return (x.T @ x).double(), (x.T @ y).double()
