"""Which rows (tokens) of a batch count, and which of them are held out.

Padding never counts. Blocks of tokens are held out by a hash of what they say, so the split does
not depend on how the text was cut into batches, on padding, or on the number of processes.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

from nbl_compiler.several_processes import ALONE, Share

# Tokens a block: long enough that neighbours of held-out tokens are mostly held out too, short
# enough that a few thousand tokens give a useful held-out part.
HOLDOUT_BLOCK = 64

Side = Literal["encoder", "decoder"]


class RowChooser:
    """Splits the rows of one batch after another into training and held-out rows.

    Args:
        holdout: Fraction of the blocks to hold out.
        seed: Of the hash.
        share: Which of the rows this process takes, of both kinds.
    """

    def __init__(self, holdout: float, seed: int, share: Share = ALONE) -> None:
        self._holdout, self._seed, self._share = holdout, seed, share
        self._chosen: dict[tuple[Side, int, int], tuple[Tensor, Tensor]] = {}
        self._moved: dict[tuple[Side, int, int, torch.device], tuple[Tensor, Tensor]] = {}
        self._masks: dict[Side, Tensor] = {}
        self._contents: dict[Side, list[Tensor]] = {}
        self._two_stacks = False
        self.recoded = False

    def start_batch(self, inputs: Mapping[str, Any], *, recoded: bool = False) -> None:
        """Take note of a batch's padding and content before the model runs it.

        Args:
            inputs: Of the model.
            recoded: Whether its most frequent tokens were replaced; not every site looks then.
        """
        self.recoded = recoded
        self._chosen, self._moved = {}, {}
        self._masks, self._contents = {}, {"encoder": [], "decoder": []}
        tensors = {name: v for name, v in sorted(inputs.items()) if isinstance(v, Tensor)}
        self._two_stacks = any(_side(name) == "decoder" for name in tensors)
        for name, value in tensors.items():
            if name in ("attention_mask", "decoder_attention_mask"):
                if value.ndim == 2:
                    self._masks[_side(name)] = value.cpu() != 0
            elif value.ndim >= 2 and "mask" not in name:
                self._contents[_side(name)].append(value.detach().cpu())

    def forget(self) -> None:
        """Let go of the last batch."""
        self.start_batch({})

    @property
    def tokens(self) -> int:
        """Number of rows of this batch that count (in any process), padding left out."""
        return sum(train.numel() + held.numel() for train, held in self._chosen.values())

    def split(self, site: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the indices of the training and of the held-out rows to take of a site's input.

        Args:
            site: Name of the site; it tells the decoder of an encoder-decoder from its encoder.
            x: The input, [B, T, d] or flattened to [B · T, d].
        """
        side: Side = "decoder" if self._two_stacks and "decoder" in site else "encoder"
        batch, length = self._batch_and_length(side, x)
        key = (side, batch, length)
        if key not in self._chosen:
            self._chosen[key] = self._choose(side, batch, length)
        there = (*key, x.device)  # sites of one model may lie on several devices
        if there not in self._moved:
            own = slice(self._share.index, None, self._share.count)
            train, held = self._chosen[key]
            self._moved[there] = (train[own].to(x.device), held[own].to(x.device))
        return self._moved[there]

    def _batch_and_length(self, side: Side, x: Tensor) -> tuple[int, int]:
        if x.ndim > 2:
            return x.shape[0], prod(x.shape[1:-1])
        known = [self._masks[side]] if side in self._masks else []
        for like in (*known, *self._contents[side]):
            if like.ndim == 2 and like.numel() == x.shape[0]:
                return like.shape[0], like.shape[1]
        return 1, x.shape[0]

    def _choose(self, side: Side, batch: int, length: int) -> tuple[Tensor, Tensor]:
        real = self._masks.get(side)
        if real is None or tuple(real.shape) != (batch, length):
            real = torch.ones(batch, length, dtype=torch.bool)
        held = torch.zeros(batch, length, dtype=torch.bool)
        if self._holdout > 0:
            own = self._contents[side] or self._contents["encoder"]
            contents = [content for content in own if content.shape[0] == batch]
            for row in range(batch):
                self._hold_blocks(held[row], real[row], [content[row] for content in contents])
        train, holdout = (real & ~held).view(-1), (real & held).view(-1)
        return train.nonzero().view(-1), holdout.nonzero().view(-1)

    def _hold_blocks(self, held: Tensor, real: Tensor, contents: list[Tensor]) -> None:
        """Mark the held-out blocks of one row; they are counted from its first real token."""
        positions = real.nonzero().view(-1)
        for number, block in enumerate(positions.split(HOLDOUT_BLOCK)):
            state = zlib.crc32(f"{self._seed}:{number}".encode())
            for content in contents:
                part = content[block] if content.shape[0] == len(real) else content
                raw = part.contiguous().view(-1).view(torch.uint8)
                state = zlib.crc32(raw.numpy().tobytes(), state)
            if _uniform(state) < self._holdout:
                held[block] = True


def _side(name: str) -> Side:
    return "decoder" if name.startswith("decoder_") else "encoder"


def _uniform(state: int) -> float:
    """Map a checksum to [0, 1), mixing its bits first (crc32 is linear)."""
    return ((state * 0x9E3779B1) & 0xFFFFFFFF) / 2**32
