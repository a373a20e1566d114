# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Triton kernels of the guarded FFN for many tokens: tiles of tokens by tiles of neurons.

Tokens of a tile share the rows they read, in matrix products. A tile of neurons that no token of
the tile chose is neither computed nor multiplied: sort the neurons by how often they are outliers,
and most tiles are such.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nbl_compiler.lowering.triton_math import affine_value, dequantize, flag_key, hidden_value


@triton.jit
def tile_dot(
    x_ptr, rows_ptr, tokens, token_inside, rows, row_inside, d, width, tokens_stride,
    BITS: tl.constexpr, DOT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x[tokens] · rows: float32 [BLOCK_T, BLOCK_N]; rows as in ``triton_math.row_dot``."""
    total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    x_base = x_ptr + tokens.to(tl.int64)[:, None] * tokens_stride
    row_base = rows_ptr + rows.to(tl.int64)[None, :] * width
    for start in range(0, width, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        within = column < width
        block = tl.load(row_base + column[:, None], within[:, None] & row_inside[None, :], 0)
        if BITS == 0:
            mask = token_inside[:, None] & within[None, :]
            x = tl.load(x_base + column[None, :], mask, 0.0)
            total = tl.dot(x.to(DOT), block.to(DOT), total, input_precision="ieee")
        else:
            for plane in tl.static_range(8 // BITS):
                place = plane * width + column
                mask = token_inside[:, None] & (within & (place < d))[None, :]
                x = tl.load(x_base + place[None, :], mask, 0.0)
                codes = ((block >> (BITS * plane)) & (2**BITS - 1)).to(DOT)
                total = tl.dot(x.to(DOT), codes, total, input_precision="ieee")
    return total


@triton.jit
def affine_tile_kernel(
    x_ptr, matrix_ptr, bias_ptr, out_ptr, tokens_count, d, rows_count,
    HAS_BIAS: tl.constexpr, DOT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out = x matrixᵀ + bias in float32; grid (blocks of tokens, blocks of rows)."""
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    token_inside, inside = tokens < tokens_count, rows < rows_count
    value = tile_dot(
        x_ptr,
        matrix_ptr,
        tokens,
        token_inside,
        rows,
        inside,
        d,
        d,
        d,
        0,
        DOT,
        BLOCK_T,
        BLOCK_N,
        BLOCK_D,
    )
    if HAS_BIAS:
        value += tl.load(bias_ptr + rows, inside, 0.0).to(tl.float32)[None, :]
    place = out_ptr + tokens.to(tl.int64)[:, None] * rows_count + rows[None, :]
    tl.store(place, value, token_inside[:, None] & inside[None, :])


@triton.jit
def flag_tile_kernel(
    x_ptr, gate_ptr, up_ptr, gate_offset_ptr, up_offset_ptr, scale_ptr, shift_ptr, slack_ptr,
    gate_slope_ptr, up_slope_ptr, intercept_ptr, low_ptr, high_ptr, column_norm_ptr, key_ptr,
    residual_ptr, x_sum_ptr, tokens_count, d, width, f, threshold,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, RANGED: tl.constexpr, SCORED: tl.constexpr,
    BITS: tl.constexpr, HAS_GATE_OFFSET: tl.constexpr, HAS_UP_OFFSET: tl.constexpr,
    CERTIFIED: tl.constexpr, PREDICTED: tl.constexpr, DOT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """As ``triton_decode.flag_kernel``; grid (blocks of tokens, blocks of neurons)."""
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    neurons = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    token_inside, inside = tokens < tokens_count, neurons < f
    both = token_inside[:, None] & inside[None, :]
    place = tokens.to(tl.int64)[:, None] * f + neurons[None, :]
    up = tile_dot(
        x_ptr, up_ptr, tokens, token_inside, neurons, inside, d, width, d, BITS, DOT,
        BLOCK_T, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    gate = up
    if GATED:
        gate = tile_dot(
            x_ptr, gate_ptr, tokens, token_inside, neurons, inside, d, width, d, BITS, DOT,
            BLOCK_T, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    if BITS > 0:
        x_sum = tl.load(x_sum_ptr + tokens, token_inside, 0.0)[:, None]
        first = f if GATED else 0  # rows of gate come first
        up = dequantize(
            up, x_sum, (first + neurons)[None, :], inside[None, :], scale_ptr, shift_ptr
        )
        if GATED:
            gate = dequantize(gate, x_sum, neurons[None, :], inside[None, :], scale_ptr, shift_ptr)
    if HAS_UP_OFFSET:
        up += tl.load(up_offset_ptr + neurons, inside, 0.0).to(tl.float32)[None, :]
    if HAS_GATE_OFFSET:
        gate += tl.load(gate_offset_ptr + neurons, inside, 0.0).to(tl.float32)[None, :]
    slack = up * 0.0
    if CERTIFIED:
        slack = tl.load(slack_ptr + place, both, 0.0)
    key = flag_key(
        gate, up, slack, neurons[None, :], inside[None, :],
        gate_slope_ptr, up_slope_ptr, intercept_ptr, low_ptr, high_ptr, column_norm_ptr, threshold,
        ACTIVATION, GATED, RANGED, SCORED,
    )  # fmt: skip
    tl.store(key_ptr + place, key, both)
    if PREDICTED:
        value = hidden_value(gate, up, ACTIVATION, GATED) - affine_value(
            gate, up, neurons[None, :], inside[None, :],
            gate_slope_ptr, up_slope_ptr, intercept_ptr, GATED,
        )  # fmt: skip
        tl.store(residual_ptr + place, value, both)


@triton.jit
def hidden_tile_kernel(
    x_ptr, gate_ptr, up_ptr, gate_bias_ptr, up_bias_ptr,
    gate_slope_ptr, up_slope_ptr, intercept_ptr, low_ptr, high_ptr,
    chosen_ptr, dense_ptr, residual_ptr, value_ptr, used_ptr, tokens_count, d, f,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_GATE_BIAS: tl.constexpr,
    HAS_UP_BIAS: tl.constexpr, CERTIFIED: tl.constexpr, PREDICTED: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """value[t, i] = h − ĥ where chosen, h on the dense path, else 0.

    Grid (blocks of tokens, blocks of neurons). A tile in which nothing is chosen is left alone and
    marked unused.
    """
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    neurons = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    token_inside, inside = tokens < tokens_count, neurons < f
    both = token_inside[:, None] & inside[None, :]
    place = tokens.to(tl.int64)[:, None] * f + neurons[None, :]
    dense = tl.load(dense_ptr + tokens, token_inside, 0)[:, None] != 0
    chosen = tl.load(chosen_ptr + place, both, 0) != 0
    needed = tl.sum(tl.sum(((chosen | dense) & both).to(tl.int32), axis=1), axis=0)
    tl.store(used_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), needed)
    if needed > 0:
        hidden = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        value = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        if PREDICTED:  # the weights are for the dense path alone
            value = tl.load(residual_ptr + place, chosen & both, 0.0)
            needed = tl.sum(tl.sum((dense & both).to(tl.int32), axis=1), axis=0)
        if needed > 0:
            up = tile_dot(
                x_ptr, up_ptr, tokens, token_inside, neurons, inside, d, d, d, 0, DOT,
                BLOCK_T, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            if HAS_UP_BIAS:
                up += tl.load(up_bias_ptr + neurons, inside, 0.0).to(tl.float32)[None, :]
            gate = up
            if GATED:
                gate = tile_dot(
                    x_ptr, gate_ptr, tokens, token_inside, neurons, inside, d, d, d, 0, DOT,
                    BLOCK_T, BLOCK_N, BLOCK_D,
                )  # fmt: skip
                if HAS_GATE_BIAS:
                    gate += tl.load(gate_bias_ptr + neurons, inside, 0.0).to(tl.float32)[None, :]
            hidden = hidden_value(gate, up, ACTIVATION, GATED)
            if not PREDICTED:
                value = hidden - affine_value(
                    gate, up, neurons[None, :], inside[None, :],
                    gate_slope_ptr, up_slope_ptr, intercept_ptr, GATED,
                )  # fmt: skip
                value = tl.where(chosen, value, 0.0)
                if CERTIFIED:
                    low = tl.load(low_ptr + neurons, inside, 0.0).to(tl.float32)[None, :]
                    high = tl.load(high_ptr + neurons, inside, 0.0).to(tl.float32)[None, :]
                    value = tl.where((up >= low) & (up <= high), 0.0, value)
        value = tl.where(dense, hidden, value)
        tl.store(value_ptr + place, value.to(value_ptr.dtype.element_ty), both)


@triton.jit
def down_tile_kernel(
    value_ptr, down_ptr, used_ptr, affine_ptr, down_bias_ptr, dense_ptr, out_ptr,
    tokens_count, f, d_out, neuron_tiles,
    HAS_DOWN_BIAS: tl.constexpr, DOT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
):  # fmt: skip
    """out = value · down + (C x + B, or b2 on the dense path), over the used tiles.

    Grid (blocks of tokens, blocks of output columns).
    """
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    token_inside, within = tokens < tokens_count, columns < d_out
    both = token_inside[:, None] & within[None, :]
    total = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
    for tile in range(neuron_tiles):
        if tl.load(used_ptr + tl.program_id(0) * neuron_tiles + tile) > 0:
            neurons = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            inside = neurons < f
            value = tl.load(
                value_ptr + tokens.to(tl.int64)[:, None] * f + neurons[None, :],
                token_inside[:, None] & inside[None, :], 0.0,
            )  # fmt: skip
            rows = tl.load(
                down_ptr + neurons.to(tl.int64)[:, None] * d_out + columns[None, :],
                inside[:, None] & within[None, :], 0.0,
            )  # fmt: skip
            total = tl.dot(value.to(DOT), rows.to(DOT), total, input_precision="ieee")
    constant = tl.zeros([BLOCK_O], tl.float32)
    if HAS_DOWN_BIAS:
        constant = tl.load(down_bias_ptr + columns, within, 0.0).to(tl.float32)
    place = tokens.to(tl.int64)[:, None] * d_out + columns[None, :]
    affine = tl.load(affine_ptr + place, both, 0.0)
    dense = tl.load(dense_ptr + tokens, token_inside, 0)[:, None] != 0
    total += tl.where(dense, constant[None, :], affine)
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), both)
