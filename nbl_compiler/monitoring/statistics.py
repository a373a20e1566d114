"""The inputs of a rewritten site: what the plan remembers, and what a watched graph adds up.

    z_j = (x_j − mean_j) / scale_j         over the calibration text: E z_j = 0, E z_j² = 1

``add_inputs`` and ``count_tokens`` are made of plain tensor operations on tensors that live as long
as the watched graph: they trace, fuse, and never wait for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

LEAST_SCALE = 1e-2
"""Share of the median standard deviation that a component's scale is at least. A component that
hardly ever moved would otherwise turn its rounding errors into drift."""


def input_statistics(mean: Tensor, variance: Tensor) -> dict[str, Tensor]:
    """Return what the plan stores of a site's inputs (``Site.inputs``).

    Args:
        mean: E[x], [d].
        variance: Var[x], [d].

    Returns:
        ``input_mean`` and ``input_scale`` (standard deviations, floored), [d] float32 each.
    """
    deviation = variance.double().clamp_min(0).sqrt()
    moving = deviation[deviation > 0]
    floor = LEAST_SCALE * float(moving.median()) if moving.numel() else 1.0
    scale = deviation.clamp_min(floor)
    return {
        "input_mean": mean.to("cpu", torch.float32).contiguous(),
        "input_scale": scale.to("cpu", torch.float32).contiguous(),
    }


@dataclass(frozen=True)
class InputSums:
    """Sums over the tokens that one site of one watched graph has read.

    Args:
        first: Σ z, [d] float64.
        second: Σ z², [d] float64.
        tokens: Their number, [] int64; sites that read the same tokens share it.
    """

    first: Tensor
    second: Tensor
    tokens: Tensor

    def clone(self) -> InputSums:
        """Return a copy; does not wait for the device."""
        return InputSums(self.first.clone(), self.second.clone(), self.tokens.clone())

    def since(self, earlier: InputSums | None) -> InputSums:
        """Return what was added since an earlier copy, on the CPU; waits for the device."""
        now = (self.first, self.second, self.tokens)
        if earlier is None:
            return InputSums(*(t.cpu() for t in now))
        then = (earlier.first, earlier.second, earlier.tokens)
        return InputSums(*((a - b).cpu() for a, b in zip(now, then, strict=True)))


def add_inputs(first: Tensor, second: Tensor, x: Tensor, mean: Tensor, rate: Tensor) -> None:
    """Add what one call of a site reads, in place.

    For a single token the sums over tokens vanish, so that Inductor can fuse all of it with the
    kernel that makes ``x``.

    Args:
        first: As in :class:`InputSums`, as is ``second``.
        second: See there.
        x: What the site reads, [..., d].
        mean: E[x] over the calibration text, [d] float32.
        rate: One over the scale, [d] float32.
    """
    z = (x.reshape(-1, x.shape[-1]).to(torch.float32) - mean) * rate
    first.add_(z.sum(0))
    second.add_(z.square().sum(0))


def count_tokens(tokens: Tensor, x: Tensor) -> None:
    """Add the number of tokens in ``x`` [..., d] to ``tokens``, in place."""
    tokens.add_(prod(x.shape[:-1]))
