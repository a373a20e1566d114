"""Streaming histograms of the pre-activations, per neuron, in memory independent of the tokens.

Bin widths are powers of two and bins lie on a fixed grid, so that coarsening is exact: the state
depends only on the tokens seen, not on their order, on how the stream was cut, or on which
process saw which part. Counts are integers; merging is exactly commutative and associative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nbl_compiler.errors import CalibrationError

DEFAULT_BINS = 512
"""Bins per neuron: 4 KiB of counts. Pre-activations span about 10 to 40 standard deviations, so a
bin is at most 0.16 standard deviations wide and usually far less."""

_MIN_EXPONENT = -120
"""Bins are at least 2^−120 wide, so that a neuron that is always zero has bins at all."""

_GRID_BITS = 40
"""Bin indices stay below 2^40: a neuron that is constant at z gets bins of relative width 2^−40,
and indices are exact in int64 and float64."""

_BLOCK_TOKENS = 1024
"""Tokens counted at a time, which bounds the index tensors."""


class RangeHistogram:
    """Histogram of each neuron's pre-activation, adapting its grid to the values seen.

    Neuron i has bins [j·w, (j+1)·w), w = 2^exponent[i], for the ``bins`` consecutive integers j
    from origin[i]. The exponent is the smallest with which the window holds all values seen.

    Args:
        neurons: f.
        bins: Bins per neuron, an even number of at least 4.
        name: What the error messages call the place where the activations were seen.
    """

    def __init__(self, neurons: int, bins: int = DEFAULT_BINS, *, name: str = "FFN") -> None:
        if bins < 4 or bins % 2:
            raise ValueError(f"bins={bins} must be an even number of at least 4")
        self.neurons = neurons
        self.bins = bins
        self.name = name
        self.tokens = 0
        self.counts = torch.zeros(neurons, bins, dtype=torch.int64)
        self.minimum = torch.full((neurons,), torch.inf, dtype=torch.float64)
        self.maximum = torch.full((neurons,), -torch.inf, dtype=torch.float64)
        self.exponent = torch.full((neurons,), _MIN_EXPONENT, dtype=torch.int64)
        self.origin = torch.zeros(neurons, dtype=torch.int64)

    def observe(self, z: Tensor) -> None:
        """Add tokens: ``z`` [..., f], any floating dtype. The counts move to its device.

        Raises:
            CalibrationError: if a value is NaN or infinite; nothing is added then.
        """
        z = z.detach().reshape(-1, self.neurons)
        if not bool(torch.isfinite(z).all()):
            raise CalibrationError(
                f"{self.name}: NaN or infinite pre-activations during calibration; run the model "
                "in a wider dtype (float32 or bfloat16) or drop the text that causes it"
            )
        if z.shape[0] == 0:
            return
        self._to(z.device)
        self._cover(z.amin(0).double(), z.amax(0).double())
        row = torch.arange(self.neurons, device=z.device) * self.bins - self.origin
        scale = power_of_two(-self.exponent)
        for block in z.split(_BLOCK_TOKENS):
            index = torch.floor(block.double() * scale).long() + row
            flat = torch.bincount(index.flatten(), minlength=self.counts.numel())
            self.counts += flat.view_as(self.counts)
        self.tokens += z.shape[0]

    def merge(self, other: RangeHistogram) -> RangeHistogram:
        """The histogram of both streams together; neither operand changes.

        Raises:
            ValueError: if the two have different neurons or bins.
        """
        if (self.neurons, self.bins) != (other.neurons, other.bins):
            raise ValueError("only histograms of the same neurons and bins can be merged")
        merged, added = self._copy(), other._copy()
        merged._to(self.counts.device)
        added._to(self.counts.device)
        merged._cover(other.minimum, other.maximum)
        added._cover(self.minimum, self.maximum)
        merged.counts = merged.counts + added.counts
        merged.tokens += added.tokens
        return merged

    def covering(self, minimum: Tensor, maximum: Tensor) -> RangeHistogram:
        """The same histogram on a grid that also holds ``minimum`` and ``maximum`` [f]."""
        copy = self._copy()
        copy.counts = self.counts.clone()
        copy._cover(minimum.to(self.minimum), maximum.to(self.maximum))
        return copy

    def edges(self) -> Tensor:
        """Bin boundaries, [f, bins + 1] float64."""
        steps = torch.arange(self.bins + 1, device=self.counts.device)
        return (self.origin[:, None] + steps) * power_of_two(self.exponent)[:, None]

    def _cover(self, minimum: Tensor, maximum: Tensor) -> None:
        """Widen the window, if need be, to hold ``minimum`` and ``maximum`` [f] as well."""
        lowest = torch.minimum(self.minimum, minimum.to(self.minimum))
        highest = torch.maximum(self.maximum, maximum.to(self.maximum))
        if torch.equal(lowest, self.minimum) and torch.equal(highest, self.maximum):
            return
        self.minimum, self.maximum = lowest, highest
        exponent, origin = _grid(lowest, highest, self.bins)
        seen = self.counts.any(1)
        if bool(seen.any()):
            steps = torch.arange(self.bins, device=self.counts.device)
            shift = torch.where(seen, exponent - self.exponent, 0)[:, None].clamp_max(63)
            index = ((self.origin[:, None] + steps) >> shift) - origin[:, None]
            # Empty bins at the rim may fall outside the new window; filled ones cannot.
            index = index.clamp(0, self.bins - 1)
            self.counts = torch.zeros_like(self.counts).scatter_add_(1, index, self.counts)
        self.exponent, self.origin = exponent, origin

    def _copy(self) -> RangeHistogram:
        fresh = object.__new__(RangeHistogram)
        fresh.__dict__.update(self.__dict__)
        return fresh

    def _to(self, device: torch.device) -> None:
        for name in ("counts", "minimum", "maximum", "exponent", "origin"):
            setattr(self, name, getattr(self, name).to(device))


def _grid(lowest: Tensor, highest: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """The finest (exponent, origin) whose ``bins`` bins hold [lowest, highest], per neuron."""
    empty = lowest > highest
    lowest, highest = lowest.masked_fill(empty, 0.0), highest.masked_fill(empty, 0.0)
    largest = torch.maximum(lowest.abs(), highest.abs())
    exponent = (torch.frexp(largest).exponent.long() - _GRID_BITS).clamp_min(_MIN_EXPONENT)
    # A width of 2^span is too small to hold the span in ``bins`` bins, or just enough.
    span = highest / bins - lowest / bins
    exponent = torch.where(
        span > 0, torch.maximum(exponent, torch.frexp(span).exponent.long() - 1), exponent
    )
    for _ in range(3):
        scale = power_of_two(-exponent)
        bins_needed = torch.floor(highest * scale) - torch.floor(lowest * scale) + 1
        exponent = exponent + (bins_needed > bins).long()
    return exponent, torch.floor(lowest * power_of_two(-exponent)).long()


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in float64, exact for int64 exponents in [−1022, 1023]."""
    return ((exponent + 1023) << 52).view(torch.float64)
