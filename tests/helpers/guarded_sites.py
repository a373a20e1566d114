"""Random guarded FFNs, at sizes that no block size divides."""

from __future__ import annotations

import torch
from torch import Tensor

from nbl_compiler.lowering.guarded_fit import fold_slopes
from nbl_compiler.lowering.guarded_site import GuardedFFN
from nbl_compiler.lowering.predictors import BITS_OF_KIND, fit_low_rank
from nbl_compiler.lowering.quantization import fit_quantized

WIDTH, NEURONS = 60, 131
RANK = 16
HALF_RANGE = 1.6
"""Of pre-activations with unit variance, about 11 % lie outside ±1.6."""


def plain_site(
    predictor_kind: str = "none",
    *,
    exact: bool = False,
    capacity: int = 20,
    overflow: str = "dense",
    activation: str = "gelu",
    dtype: torch.dtype = torch.float32,
    width: int = WIDTH,
    neurons: int = NEURONS,
    half_range: float = HALF_RANGE,
    scored: bool = True,
    values: str = "original",
) -> GuardedFFN:
    """A plain FFN with ranges [−half_range, half_range] and one random slope per neuron."""
    up, up_bias, down, down_bias = _weights(width, neurons, dtype)
    limit = torch.full((neurons,), half_range)
    unfolded = GuardedFFN(
        None, up, down, None, up_bias, down_bias, up.new_zeros(width, width), up.new_zeros(width),
        None, 0.3 * torch.randn(neurons), 0.3 * torch.randn(neurons), -limit, limit,
        down.float().norm(dim=1) if scored else None,
        _predictor(predictor_kind, up, up_bias, exact), activation, predictor_kind, exact, capacity,
        overflow, values=values,
    )  # fmt: skip
    return folded(unfolded)


def gated_site(
    predictor_kind: str = "none",
    *,
    capacity: int = 20,
    overflow: str = "truncate",
    threshold: float = -1.0,
    activation: str = "silu",
    dtype: torch.dtype = torch.float32,
    width: int = WIDTH,
    neurons: int = NEURONS,
    values: str = "original",
) -> GuardedFFN:
    """A gated FFN with two random slopes per neuron and a threshold."""
    up, up_bias, down, down_bias = _weights(width, neurons, dtype)
    gate, gate_bias, _, _ = _weights(width, neurons, dtype)
    predictor = _predictor(
        predictor_kind, torch.cat([gate, up]), torch.cat([gate_bias, up_bias]), False
    )
    slopes = 0.3 * torch.randn(3, neurons)
    unfolded = GuardedFFN(
        gate, up, down, gate_bias, up_bias, down_bias, up.new_zeros(width, width),
        up.new_zeros(width), slopes[0], slopes[1], slopes[2], None, None,
        down.float().norm(dim=1), predictor, activation, predictor_kind, False, capacity, overflow,
        threshold, values,
    )  # fmt: skip
    return folded(unfolded)


def folded(site: GuardedFFN) -> GuardedFFN:
    """The site with C and B folded from its slopes, in place of whatever they were."""
    matrix, bias = fold_slopes(site)
    site.folded.copy_(matrix)
    site.folded_bias.copy_(bias)
    return site


def _weights(width: int, neurons: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    up, down = torch.randn(neurons, width) / width**0.5, torch.randn(neurons, width) / neurons**0.5
    up_bias, down_bias = 0.1 * torch.randn(neurons), 0.1 * torch.randn(width)
    return up.to(dtype), up_bias.to(dtype), down.to(dtype), down_bias.to(dtype)


def _predictor(kind: str, weight: Tensor, bias: Tensor, certified: bool) -> list[Tensor]:
    if kind == "none":
        return []
    if kind == "low_rank":
        return fit_low_rank(weight, bias, RANK).tensors
    return fit_quantized(weight, bias, BITS_OF_KIND[kind], certified=certified).tensors
