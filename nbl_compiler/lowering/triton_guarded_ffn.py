"""The guarded FFN on GPUs: launches of the Triton kernels.

Nothing here waits for the device: which tokens take the dense path, and which neurons are outliers,
stays on it, so CUDA graphs can capture the op. Up to :data:`DECODE_TOKENS` tokens the gathering
kernels of :mod:`triton_decode` run, beyond that the tiles of :mod:`triton_prefill`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nbl_compiler.lowering import triton_decode, triton_prefill
from nbl_compiler.lowering.guarded_ffn import guarded_ffn, reference, unpack_arguments
from nbl_compiler.lowering.guarded_site import GuardedFFN, GuardedOutput
from nbl_compiler.lowering.predictors import BITS_OF_KIND, certified_slack

DECODE_TOKENS = 16
"""Most tokens for which each token gathers its own rows."""

BLOCK_NEURONS = 16
BLOCK_COLUMNS = 128
SPLITS = 8
"""Decode: programs per block of output columns; with 128 columns each and 2,048 outputs, 128
programs a token, one for each multiprocessor of a large GPU."""

TILE_TOKENS, TILE_NEURONS, TILE_DEPTH = 32, 32, 64

MAX_NEURONS = 32_768
"""The selection holds one token's scores in the registers of one program."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supported(site: GuardedFFN, x: Tensor) -> bool:
    """Whether the kernels can run ``site`` on ``x``; the reference runs what they cannot."""
    matrices = [site.up, site.down, site.folded] + ([] if site.gate is None else [site.gate])
    return (
        x.dtype in DTYPES
        and all(m.dtype == x.dtype and m.is_contiguous() for m in matrices)
        and all(t.is_contiguous() for t in site.predictor)
        and max(site.neurons, site.down.shape[1]) <= MAX_NEURONS
    )


def run(site: GuardedFFN, x: Tensor) -> GuardedOutput:
    """Compute the op on ``x`` [..., d] with the Triton kernels; ``supported`` must hold."""
    tokens = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous()
    output = torch.empty(tokens.shape[0], site.down.shape[1], dtype=x.dtype, device=x.device)
    outliers = torch.empty(tokens.shape[0], dtype=torch.int32, device=x.device)
    dense = torch.empty(tokens.shape[0], dtype=torch.int8, device=x.device)
    if tokens.shape[0] > DECODE_TOKENS:
        _prefill(site, tokens, output, outliers, dense)
    elif tokens.shape[0] > 0:
        _decode(site, tokens, output, outliers, dense)
    return GuardedOutput(output.reshape(*x.shape[:-1], output.shape[1]), outliers, dense != 0)


@guarded_ffn.register_kernel("cuda")
def _(x: Tensor, *arguments: object) -> tuple[Tensor, Tensor, Tensor]:
    site = unpack_arguments(arguments)
    return run(site, x) if supported(site, x) else reference(site, x)


@dataclass(frozen=True)
class _Seen:
    """What the flagging kernels read: weights, or a predictor in their place.

    Args:
        x: The vectors that the rows are multiplied with [tokens, d] (low rank: basis x).
        gate: Rows of gate, or of up again for a plain FFN.
        up: Rows of up.
        gate_offset: Added to the gate's products, or None.
        up_offset: Added to up's products, or None.
        bits: 0 for floating-point rows.
        scale: Per-row scale of codes, or None.
        shift: Per-row shift of codes, or None.
        slack: Certified slack [tokens, f], or None.
    """

    x: Tensor
    gate: Tensor
    up: Tensor
    gate_offset: Tensor | None
    up_offset: Tensor | None
    bits: int = 0
    scale: Tensor | None = None
    shift: Tensor | None = None
    slack: Tensor | None = None


def _seen(site: GuardedFFN, x: Tensor) -> _Seen:
    if site.predictor_kind == "none":
        gate = site.up if site.gate is None else site.gate
        return _Seen(x, gate, site.up, site.gate_bias, site.up_bias)
    first = 0 if site.gate is None else site.neurons
    if site.predictor_kind == "low_rank":
        basis, rows, offset = site.predictor
        reduced = _affine(x if x.dtype == basis.dtype else x.float(), basis, None)
        return _Seen(reduced, rows, rows[first:], offset, offset[first:])
    codes, scale, shift, offset = site.predictor[:4]
    slack = certified_slack(site.predictor, x.float()) if site.certified else None
    bits = BITS_OF_KIND[site.predictor_kind]
    return _Seen(x, codes, codes[first:], offset, offset[first:], bits, scale, shift, slack)


def _affine(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """x matrixᵀ + bias, accumulated and returned in float32."""
    tokens, d = x.shape
    rows = matrix.shape[0]
    out = torch.empty(tokens, rows, dtype=torch.float32, device=x.device)
    flags = {"HAS_BIAS": bias is not None}
    if tokens <= DECODE_TOKENS:
        grid = (tokens, triton.cdiv(rows, BLOCK_NEURONS))
        triton_decode.affine_kernel[grid](
            x, matrix, _pointer(bias, x), out, d, rows, **flags, **_row_blocks(d)
        )
    else:
        grid = (triton.cdiv(tokens, TILE_TOKENS), triton.cdiv(rows, TILE_NEURONS))
        triton_prefill.affine_tile_kernel[grid](
            x, matrix, _pointer(bias, x), out, tokens, d, rows, **flags, **_tile_blocks(x)
        )
    return out


def _decode(site: GuardedFFN, x: Tensor, output: Tensor, outliers: Tensor, dense: Tensor) -> None:
    tokens, d = x.shape
    f, d_out = site.down.shape
    affine = _affine(x, site.folded, site.folded_bias)
    keys, residual = _keys(site, x)
    listed = torch.empty(tokens, f, dtype=torch.int32, device=x.device)
    length = torch.empty(tokens, dtype=torch.int32, device=x.device)
    _select(site, keys, affine, listed, length, outliers, dense, as_list=True)
    values = torch.empty(tokens, f, dtype=torch.float32, device=x.device)
    triton_decode.residual_kernel[(tokens, triton.cdiv(f, BLOCK_NEURONS))](
        x, *_neuron_pointers(site, x), listed, length, dense, residual, values, d, f,
        **_neuron_flags(site), **_row_blocks(d),
    )  # fmt: skip
    partial = torch.empty(tokens, SPLITS, d_out, dtype=torch.float32, device=x.device)
    columns = triton.cdiv(d_out, BLOCK_COLUMNS)
    triton_decode.gather_down_kernel[(tokens, columns, SPLITS)](
        values, site.down, listed, length, dense, partial, d_out, f,
        SPLITS=SPLITS, BLOCK_N=BLOCK_NEURONS, BLOCK_O=BLOCK_COLUMNS,
    )  # fmt: skip
    triton_decode.combine_kernel[(tokens, columns)](
        partial, affine, _pointer(site.down_bias, x), dense, output, d_out,
        HAS_DOWN_BIAS=site.down_bias is not None, SPLITS=SPLITS, BLOCK_O=BLOCK_COLUMNS,
    )  # fmt: skip


def _prefill(site: GuardedFFN, x: Tensor, output: Tensor, outliers: Tensor, dense: Tensor) -> None:
    tokens, d = x.shape
    f, d_out = site.down.shape
    affine = _affine(x, site.folded, site.folded_bias)
    keys, residual = _keys(site, x)
    chosen = torch.empty(tokens, f, dtype=torch.int8, device=x.device)
    _select(site, keys, affine, chosen, outliers, outliers, dense, as_list=False)
    token_tiles, neuron_tiles = triton.cdiv(tokens, TILE_TOKENS), triton.cdiv(f, TILE_NEURONS)
    values = torch.empty(tokens, f, dtype=x.dtype, device=x.device)
    used = torch.empty(token_tiles, neuron_tiles, dtype=torch.int32, device=x.device)
    triton_prefill.hidden_tile_kernel[(token_tiles, neuron_tiles)](
        x, *_neuron_pointers(site, x), chosen, dense, residual, values, used, tokens, d, f,
        **_neuron_flags(site), **_tile_blocks(x),
    )  # fmt: skip
    triton_prefill.down_tile_kernel[(token_tiles, triton.cdiv(d_out, TILE_NEURONS))](
        values, site.down, used, affine, _pointer(site.down_bias, x), dense, output,
        tokens, f, d_out, neuron_tiles,
        HAS_DOWN_BIAS=site.down_bias is not None,
        DOT=_dot_dtype(x), BLOCK_T=TILE_TOKENS, BLOCK_N=TILE_NEURONS, BLOCK_O=TILE_NEURONS,
    )  # fmt: skip


def _keys(site: GuardedFFN, x: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of the flagged neurons, −1 for the others, and predicted h − ĥ if they are used.

    Both float32 [tokens, f]; a stand-in where there is nothing predicted.
    """
    tokens = x.shape[0]
    seen = _seen(site, x)
    d, width = seen.x.shape[1], seen.up.shape[1]
    keys = torch.empty(tokens, site.neurons, dtype=torch.float32, device=x.device)
    residual = torch.empty_like(keys) if site.corrects_by_prediction else keys
    x_sum = seen.x.float().sum(-1) if seen.bits else seen.x
    pointers = (
        seen.x, seen.gate, seen.up, *(_pointer(t, x) for t in (
            seen.gate_offset, seen.up_offset, seen.scale, seen.shift, seen.slack, site.gate_slope,
            site.up_slope, site.intercept, site.low, site.high, site.column_norm,
        )), keys, residual, x_sum,
    )  # fmt: skip
    flags: dict[str, Any] = {
        "ACTIVATION": site.activation,
        "GATED": site.gate is not None,
        "RANGED": site.low is not None,
        "SCORED": site.column_norm is not None,
        "BITS": seen.bits,
        "HAS_GATE_OFFSET": site.gate is not None and seen.gate_offset is not None,
        "HAS_UP_OFFSET": seen.up_offset is not None,
        "CERTIFIED": seen.slack is not None,
        "PREDICTED": site.corrects_by_prediction,
    }
    if tokens <= DECODE_TOKENS:
        grid = (tokens, triton.cdiv(site.neurons, BLOCK_NEURONS))
        triton_decode.flag_kernel[grid](
            *pointers, d, width, site.neurons, float(site.threshold), **flags, **_row_blocks(width)
        )
    else:
        grid = (triton.cdiv(tokens, TILE_TOKENS), triton.cdiv(site.neurons, TILE_NEURONS))
        triton_prefill.flag_tile_kernel[grid](
            *pointers, tokens, d, width, site.neurons, float(site.threshold), **flags,
            **_tile_blocks(seen.x),
        )  # fmt: skip
    return keys, residual


def _select(
    site: GuardedFFN, keys: Tensor, affine: Tensor, chosen: Tensor, length: Tensor,
    outliers: Tensor, dense: Tensor, as_list: bool,
) -> None:  # fmt: skip
    tokens, f = keys.shape
    d_out = affine.shape[1]
    block = triton.next_power_of_2(f)
    triton_decode.select_kernel[(tokens,)](
        keys, affine, chosen, chosen, length, outliers, dense, f, d_out, site.capacity,
        DENSE_ON_OVERFLOW=site.overflow == "dense", AS_LIST=as_list,
        BLOCK_F=block, BLOCK_O=triton.next_power_of_2(d_out), num_warps=_warps(block),
    )  # fmt: skip


def _warps(block: int) -> int:
    """Warps for one program over ``block`` values: about 16 to 64 values a thread."""
    return 4 if block <= 4096 else 8 if block <= 8192 else 16


def _row_blocks(width: int) -> dict[str, int]:
    depth = min(triton.next_power_of_2(width), BLOCK_COLUMNS)
    return {"BLOCK_N": BLOCK_NEURONS, "BLOCK_D": depth}


def _tile_blocks(x: Tensor) -> dict[str, Any]:
    blocks = {"BLOCK_T": TILE_TOKENS, "BLOCK_N": TILE_NEURONS, "BLOCK_D": TILE_DEPTH}
    return {"DOT": _dot_dtype(x), **blocks}


def _dot_dtype(x: Tensor) -> tl.dtype:
    """The dtype of matrix products' operands: that of x, all products being exact in float32.

    Triton's interpreter multiplies the bit patterns of bfloat16; there they are widened first.
    """
    if x.dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        return tl.float32
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[
        x.dtype
    ]


def _pointer(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """A kernel argument for an optional tensor; kernels do not read the stand-in."""
    return stand_in if tensor is None else tensor.contiguous()


def _neuron_pointers(site: GuardedFFN, x: Tensor) -> tuple[Tensor, ...]:
    gate = site.up if site.gate is None else site.gate
    optional = (
        site.gate_bias, site.up_bias,
        site.gate_slope, site.up_slope, site.intercept, site.low, site.high,
    )  # fmt: skip
    return gate, site.up, *(_pointer(t, x) for t in optional)


def _neuron_flags(site: GuardedFFN) -> dict[str, Any]:
    return {
        "ACTIVATION": site.activation,
        "GATED": site.gate is not None,
        "HAS_GATE_BIAS": site.gate_bias is not None,
        "HAS_UP_BIAS": site.up_bias is not None,
        "CERTIFIED": site.certified,
        "PREDICTED": site.corrects_by_prediction,
    }
