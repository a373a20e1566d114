"""Does every row of the calibration text open as the model's training text did?

A model that was trained with a BOS token in front lets attention sink into it. Rows that were cut
out of a longer text, as by ``ids.view(-1, 512)``, lack it; their activations are others, and a fit
that sees both kinds serves neither.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nbl_compiler.errors import NBLWarning


class RowOpenings:
    """Counts the rows that open with BOS.

    Args:
        model: Its configuration says which token BOS is; without one nothing is counted.
    """

    def __init__(self, model: nn.Module) -> None:
        config = getattr(model, "config", None)
        bos = getattr(config, "bos_token_id", None)
        self._bos = bos if isinstance(bos, int) else None
        self._rows = self._opened = 0

    def add(self, inputs: Mapping[str, Any]) -> None:
        """Count the rows of one batch ([B, T] token ids; padding in front is passed over)."""
        ids = inputs.get("input_ids")
        if self._bos is None or not isinstance(ids, Tensor) or ids.ndim != 2 or not ids.numel():
            return
        mask = inputs.get("attention_mask")
        first = torch.zeros_like(ids[:, 0])
        if isinstance(mask, Tensor) and mask.shape == ids.shape:
            first = mask.ne(0).int().argmax(1)
        self._rows += ids.shape[0]
        self._opened += int((ids.gather(1, first[:, None]) == self._bos).sum())

    def warn(self) -> None:
        """Warn if some rows open with BOS and others do not."""
        missing = self._rows - self._opened
        if self._opened and missing:
            warnings.warn(
                f"{missing} of {self._rows} calibration rows do not open with the BOS token as the "
                "others do, and as prompts will; open each with it (nbl.token_batches does that), "
                "or the fit will be worse",
                NBLWarning,
                stacklevel=2,
            )
