"""Thresholds on the size of activations, from calibration text: what TEAL and CATS share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

MOST_VALUES = 2**22
"""A quantile of so many values, evenly spread, is known to a thousandth."""


def magnitude_quantile(values: Tensor, share: float) -> float:
    """Return the threshold below which ``share`` of the |values| lie; 0 for a share of 0."""
    if share == 0:
        return 0.0
    flat = values.detach().abs().flatten()
    flat = flat[:: -(-flat.numel() // MOST_VALUES)].float()
    return float(flat.kthvalue(max(round(share * flat.numel()), 1)).values)


class Sparsify(nn.Module):
    """Sets values of at most ``threshold`` in size to zero; 0 lets everything pass.

    Args:
        threshold: In the units of the activations.
    """

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        """Return x with its small values at zero, of the same shape."""
        return torch.where(x.abs() > self.threshold, x, 0.0)
