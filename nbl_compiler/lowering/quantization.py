"""Quantized predictors: a copy of the weights at 8, 4 or 2 bits, and what rounding can do to it.

The quantizer is torch's own per-channel affine one (``torch.ao.quantization``), per row of W.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nbl_compiler.errors import ConfigError
from nbl_compiler.lowering.predictors import BITS_OF_KIND, QuantizedPredictor, pack

FLOAT32_UNIT = 2.0**-24
"""Unit roundoff of float32, the narrowest type that pre-activations are accumulated in."""


def fit_quantized(
    weight: Tensor,
    bias: Tensor | None,
    bits: int,
    mean: Tensor | None = None,
    certified: bool = False,
) -> QuantizedPredictor:
    """Quantize W per row with torch's per-channel affine quantizer.

    The range of every row is shrunk by the factor, out of :data:`CLIPPINGS`, that leaves the least
    squared error: at 2 bits the full range would spend its four levels on the tails.

    Args:
        weight: W [n, d].
        bias: b [n], or None.
        bits: 2, 4 or 8.
        mean: Mean of x [d]; the offset then makes up for the rounding error at the mean.
        certified: Add the bound on the rounding error, which every input obeys.

    Raises:
        ConfigError: for another number of bits.
    """
    if f"quantized_{bits}" not in BITS_OF_KIND:
        raise ConfigError(f"a quantized predictor has 2, 4 or 8 bits, not {bits}")
    codes, scale, zero_point = _best_quantization(weight.float(), bits)
    scale, shift = scale.float(), -(scale * zero_point).float()
    width = weight.shape[1]
    centre = torch.zeros(width) if mean is None else mean.float().cpu()
    centre = centre.to(weight.device)
    rounded = codes.double() * scale.double()[:, None] + shift.double()[:, None]
    error = weight.double() - rounded
    exact_offset = error @ centre.double() + (0.0 if bias is None else bias.double())
    offset = exact_offset.float()
    certificate = None
    if certified:
        offset_error = (exact_offset - offset.double()).abs()
        size = (codes.double() * scale.double()[:, None]).norm(dim=1)
        size += shift.double().abs() * width**0.5 + weight.double().norm(dim=1)
        size += exact_offset.abs() + (0.0 if bias is None else bias.double().abs())
        steps = (width + _EXTRA_ROUNDINGS) * FLOAT32_UNIT
        rounding = size * steps / (1 - steps) + offset_error
        radius = _round_up(error.norm(dim=1))
        certificate = (radius, _round_up(rounding), centre)
    return QuantizedPredictor(bits, pack(codes, bits), scale, shift, offset, certificate)


CLIPPINGS: tuple[float, ...] = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
"""Shares of a row's range that the quantizer may cover."""

_EXTRA_ROUNDINGS = 8
"""Roundings after the dot product: scale, shift, offset, their sums, and the bias of W x + b."""


def _best_quantization(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes uint8 [n, d], scale [n] and zero point [n] of the least squared error."""
    chosen: tuple[Tensor, Tensor, Tensor] | None = None
    least = torch.full_like(weight[:, 0], torch.inf)
    lowest, highest = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    for share in CLIPPINGS:
        candidate = _quantize(weight.clamp(share * lowest, share * highest), bits)
        codes, scale, zero_point = candidate
        rounded = (codes.float() - zero_point[:, None]) * scale[:, None]
        error = (weight - rounded).square().sum(1)
        better = error < least
        least = torch.where(better, error, least)
        if chosen is None:
            chosen = candidate
        chosen = (
            torch.where(better[:, None], codes, chosen[0]),
            torch.where(better, scale, chosen[1]),
            torch.where(better, zero_point, chosen[2]),
        )
    assert chosen is not None
    return chosen


def _quantize(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    from torch.ao.quantization.fx import _decomposed  # noqa: F401  registers the ops below
    from torch.ao.quantization.observer import PerChannelMinMaxObserver

    top = 2**bits - 1
    observer = PerChannelMinMaxObserver(
        ch_axis=0, dtype=torch.uint8, qscheme=torch.per_channel_affine, quant_min=0, quant_max=top
    ).to(weight.device)
    observer(weight)
    scale, zero_point = observer.calculate_qparams()
    codes = torch.ops.quantized_decomposed.quantize_per_channel(
        weight, scale, zero_point, 0, 0, top, torch.uint8
    )
    return codes, scale, zero_point


def _round_up(bound: Tensor) -> Tensor:
    """A float64 bound as float32, never smaller."""
    rounded = bound.float()
    return torch.where(
        rounded.double() < bound, rounded.nextafter(torch.full_like(rounded, torch.inf)), rounded
    )
