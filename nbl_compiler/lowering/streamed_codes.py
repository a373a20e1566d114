"""Sums over quantized weights for a few tokens on a CPU: codes are unpacked in registers.

    y_tn = Σ_j code_nj x_tj        codes of 2, 4 or 8 bits in bytes, or int8

Inductor has no vectorised conversion of 8-bit integers to float on AVX2, so bytes are read four at
a time, as 32-bit words, which it converts at full width. A field of a word (one code) is masked
out, not shifted down: that leaves 2^s times the code, and x is multiplied by 2^−s beforehand, both
exact. The words are loaded as float32, and are int32 from there on: torch's vectors of integers
load through the stack, in halves, for which every load waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nbl_compiler.lowering.streamed_linear import token_sums
from nbl_compiler.lowering.widened import widened

_WORD = 4
"""Bytes."""
_SIGN_BITS = -0x7F7F7F80
"""0x80808080 as int32: flips each byte's sign bit, which adds 128 to an int8."""


class _Field(NamedTuple):
    """One code of each word.

    Args:
        values: Words [n, w] to 2^shift · code, float32.
        shift: s.
    """

    values: Tensor
    shift: int


def code_sums(x: Tensor, codes: Tensor, bits: int) -> Tensor:
    """Return Σ_j code_nj x_tj, [t, n] float32.

    Args:
        x: [t, d], float32.
        codes: uint8 [n, ceil(d / (8 / bits))], planar (``lowering.predictors.pack``).
        bits: 2, 4 or 8.
    """
    planes, width = 8 // bits, codes.shape[1]
    padded = torch.nn.functional.pad(x, (0, planes * width - x.shape[1]))
    by_plane = padded.unflatten(1, (planes, width))
    if width % _WORD:
        mask = 2**bits - 1
        parts = [(codes >> (bits * plane) & mask).float() for plane in range(planes)]
        return _sums(by_plane, parts)
    words = _words(codes)
    fields = [
        _unsigned(words, bits, 8 * byte + bits * plane)
        for plane in range(planes)
        for byte in range(_WORD)
    ]
    return _field_sums(by_plane, fields)


def int8_sums(x: Tensor, codes: Tensor) -> Tensor:
    """Return Σ_j code_nj x_tj, [t, n] float32.

    Args:
        x: [t, d].
        codes: int8 [n, d].
    """
    by_plane = x.float()[:, None]  # half precision has no 2^−24
    if codes.shape[1] % _WORD or not codes.is_contiguous():
        return _sums(by_plane, [codes.float()])
    words = _words(codes)
    raised = words ^ _SIGN_BITS
    fields = [
        _Field((_field(raised, 8, shift) - (128 << shift)).float(), shift) for shift in (0, 8, 16)
    ]
    fields.append(_Field(_field(words, 8, 24).float(), 24))  # the word's sign is the code's
    return _field_sums(by_plane, fields)


def _words(codes: Tensor) -> Tensor:
    """Return bytes [n, w] as int32 [n, w / 4], loaded as float32."""
    return codes.view(torch.float32).view(torch.int32)


def _field_sums(by_plane: Tensor, fields: Sequence[_Field]) -> Tensor:
    """Return the sums of x [t, planes, bytes] with fields in the order of planes, then bytes."""
    scales = [2.0**-field.shift for field in fields]
    by_field = by_plane.unflatten(2, (-1, _WORD)).transpose(2, 3).flatten(1, 2)
    scaled = torch.stack([by_field[:, i] * scale for i, scale in enumerate(scales)], 1)
    return _sums(scaled, [field.values for field in fields])


def _sums(parts: Tensor, values: Sequence[Tensor]) -> Tensor:
    """Return Σ_p Σ_j values_p[n, j] parts[t, p, j], [t, n]."""

    def sum_of(token: Tensor) -> Tensor:
        first, *others = [value * part for value, part in zip(values, token.unbind(0), strict=True)]
        total: Tensor = sum(others, first)
        return total.sum(-1)

    return token_sums(widened(parts), sum_of)


def _unsigned(words: Tensor, bits: int, shift: int) -> _Field:
    if shift + bits < 8 * _WORD:
        return _Field(_field(words, bits, shift).float(), shift)
    # The uppermost field holds the word's sign.
    return _Field(((words >> shift) & (2**bits - 1)).float(), 0)


def _field(words: Tensor, bits: int, shift: int) -> Tensor:
    mask = (2**bits - 1) << shift
    masked: Tensor = words & (mask if mask < 2**31 else mask - 2**32)
    return masked
