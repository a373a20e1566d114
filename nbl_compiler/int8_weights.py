"""Matrices held as int8 with one scale a row: those of a torchao-quantized model, and a plan's own.

    W ≈ scale[:, None] * codes        codes [n, d] int8, scale [n] float32

torchao's weight-only scheme (``Int8WeightOnlyConfig``, ``PerRow``): symmetric, a row's greatest
magnitude is 127.5 steps. So the greatest magnitude of a row survives quantization exactly, up to
the rounding of the scale, and every other entry to half a step. Nothing here imports torchao.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from nbl_compiler.errors import UnsupportedDtypeError

Quantize = Literal["auto", "int8", "off"]
QUANTIZE: tuple[str, ...] = get_args(Quantize)
"""How a plan's matrices are held: as the weights that they replace, as int8, or as floats."""

LEVELS = 127.5
"""Steps from zero to a row's greatest magnitude: half of the 255 between −128 and 127."""
_LOWEST, _HIGHEST = -128, 127
_LEAST_SCALE = torch.finfo(torch.float32).eps  # as torchao: a row of zeros has a scale too


@dataclass(frozen=True)
class Int8Matrix:
    """A matrix as int8.

    Args:
        codes: [n, d] int8.
        scale: [n] float32, the size of one step in each row.
    """

    codes: Tensor
    scale: Tensor

    def rows(self, indices: Tensor) -> Int8Matrix:
        """Return some rows ([k] int64), bit for bit."""
        indices = indices.to(self.codes.device)
        return Int8Matrix(self.codes[indices], self.scale[indices])

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the matrix that this stands for, [n, d]."""
        return (self.codes.float() * self.scale.float()[:, None]).to(dtype)


def quantize_rows(matrix: Tensor) -> Int8Matrix:
    """Quantize a matrix as torchao does a float32 weight: [n, d] to int8, a scale a row."""
    wide = matrix.detach().float()
    scale = (wide.abs().amax(dim=1) / LEVELS).clamp(min=_LEAST_SCALE)
    codes = (wide * (1.0 / scale)[:, None]).round().clamp(_LOWEST, _HIGHEST)
    return Int8Matrix(codes.to(torch.int8), scale)


def stacked(parts: Iterable[Int8Matrix]) -> Int8Matrix:
    """Return one matrix of all rows, [Σn, d]."""
    given = list(parts)
    return Int8Matrix(torch.cat([p.codes for p in given]), torch.cat([p.scale for p in given]))


def is_quantized(weight: object) -> bool:
    """Tell whether a weight is one of torchao's quantized tensors, of whatever scheme."""
    return isinstance(weight, Tensor) and type(weight).__module__.partition(".")[0] == "torchao"


def int8_matrix(weight: Tensor) -> Int8Matrix | None:
    """Return the parts of a weight that torchao quantized to int8 row by row, or None.

    None also for int8 with quantized activations, or with groups within a row.
    """
    held: Any = weight
    if not is_quantized(weight) or type(weight).__name__ != "Int8Tensor" or weight.ndim != 2:
        return None
    if held.act_quant_kwargs is not None or held.act_pre_scale is not None or held.reduce_range:
        return None
    rows, width = weight.shape
    if list(held.block_size) != [1, width] or held.scale.numel() != rows:
        return None
    return Int8Matrix(held.qdata, held.scale.reshape(-1))


def int8_of(weight: Tensor, what: str) -> Int8Matrix:
    """Return the parts of a quantized weight.

    Raises:
        UnsupportedDtypeError: if it is quantized by another scheme.
    """
    matrix = int8_matrix(weight)
    if matrix is None:
        raise UnsupportedDtypeError(
            f"{what} is a {type(weight).__name__} that a plan cannot be applied to; quantize the "
            "model by torchao's Int8WeightOnlyConfig() (one scale a row, the default)"
        )
    return matrix


def held_parts(weight: Tensor) -> dict[str, Tensor]:
    """Return name → tensor of the tensors that a quantized weight consists of."""
    whole: Any = weight
    names, _ = whole.__tensor_flatten__()
    return {name: getattr(whole, name) for name in names}


def held_tensors(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors that a tensor's memory consists of: codes and scales, or itself."""
    return list(held_parts(tensor).values()) if is_quantized(tensor) else [tensor]
