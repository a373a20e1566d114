# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Triton kernels of the guarded FFN for a few tokens: every token reads its own rows.

One token passes through ``flag`` (fused predictor and outlier test), ``select`` (capacity, overflow
and compaction, all on the device), ``residual`` (gathered rows of gate and up), ``gather_down``
(gathered rows of W2ᵀ, in splits) and ``combine``. A token on the dense path runs the same kernels
with the list of all neurons, so nothing is read back to the host. All sums have a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nbl_compiler.lowering.triton_math import (
    affine_value,
    dequantize,
    flag_key,
    hidden_value,
    row_dot,
)


@triton.jit
def affine_kernel(
    x_ptr, matrix_ptr, bias_ptr, out_ptr, d, rows_count,
    HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[t] = matrix x[t] + bias in float32; grid (tokens, blocks of rows)."""
    token = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < rows_count
    value = row_dot(x_ptr + token * d, matrix_ptr, rows, inside, d, 0, BLOCK_N, BLOCK_D, d)
    if HAS_BIAS:
        value += tl.load(bias_ptr + rows, inside, 0.0).to(tl.float32)
    tl.store(out_ptr + token * rows_count + rows, value, inside)


@triton.jit
def flag_kernel(
    x_ptr, gate_ptr, up_ptr, gate_offset_ptr, up_offset_ptr, scale_ptr, shift_ptr, slack_ptr,
    gate_slope_ptr, up_slope_ptr, intercept_ptr, low_ptr, high_ptr, column_norm_ptr, key_ptr,
    residual_ptr, x_sum_ptr, d, width, f, threshold,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, RANGED: tl.constexpr, SCORED: tl.constexpr,
    BITS: tl.constexpr, HAS_GATE_OFFSET: tl.constexpr, HAS_UP_OFFSET: tl.constexpr,
    CERTIFIED: tl.constexpr, PREDICTED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """key[t, i] = score of neuron i if flagged, else −1; grid (tokens, blocks of neurons).

    With PREDICTED also residual[t, i] = h − ĥ, what outliers are put right with.
    """
    token = tl.program_id(0).to(tl.int64)
    neurons = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = neurons < f
    x_ptr += token * d
    up = row_dot(x_ptr, up_ptr, neurons, inside, width, BITS, BLOCK_N, BLOCK_D, d)
    gate = up
    if GATED:
        gate = row_dot(x_ptr, gate_ptr, neurons, inside, width, BITS, BLOCK_N, BLOCK_D, d)
    if BITS > 0:
        x_sum = tl.load(x_sum_ptr + token)
        first = f if GATED else 0  # rows of gate come first
        up = dequantize(up, x_sum, first + neurons, inside, scale_ptr, shift_ptr)
        if GATED:
            gate = dequantize(gate, x_sum, neurons, inside, scale_ptr, shift_ptr)
    if HAS_UP_OFFSET:
        up += tl.load(up_offset_ptr + neurons, inside, 0.0).to(tl.float32)
    if HAS_GATE_OFFSET:
        gate += tl.load(gate_offset_ptr + neurons, inside, 0.0).to(tl.float32)
    slack = up * 0.0
    if CERTIFIED:
        slack = tl.load(slack_ptr + token * f + neurons, inside, 0.0)
    key = flag_key(
        gate, up, slack, neurons, inside,
        gate_slope_ptr, up_slope_ptr, intercept_ptr, low_ptr, high_ptr, column_norm_ptr, threshold,
        ACTIVATION, GATED, RANGED, SCORED,
    )  # fmt: skip
    tl.store(key_ptr + token * f + neurons, key, inside)
    if PREDICTED:
        fit = affine_value(
            gate, up, neurons, inside, gate_slope_ptr, up_slope_ptr, intercept_ptr, GATED
        )
        value = hidden_value(gate, up, ACTIVATION, GATED) - fit
        tl.store(residual_ptr + token * f + neurons, value, inside)


@triton.jit
def select_kernel(
    key_ptr, affine_ptr, list_ptr, chosen_ptr, length_ptr, outliers_ptr, dense_ptr,
    f, d_out, capacity,
    DENSE_ON_OVERFLOW: tl.constexpr, AS_LIST: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Choose the neurons of one token within the capacity; grid (tokens,).

    The capacity-th largest score is found by bisection on the bits of the (non-negative) scores; of
    equal scores the first neurons win. Writes the chosen neurons as a list in ascending order, or
    as a mask.
    """
    token = tl.program_id(0).to(tl.int64)
    neurons = tl.arange(0, BLOCK_F)
    inside = neurons < f
    key = tl.load(key_ptr + token * f + neurons, inside, -1.0)
    flagged = key >= 0.0
    outliers = tl.sum(flagged.to(tl.int32), axis=0)
    columns = tl.arange(0, BLOCK_O)
    affine = tl.load(affine_ptr + token * d_out + columns, columns < d_out, 0.0)
    dense = tl.sum((tl.abs(affine) < float("inf")).to(tl.int32), axis=0) < BLOCK_O
    if DENSE_ON_OVERFLOW:
        dense = dense | (outliers > capacity)
    bits = tl.where(flagged, key, 0.0).to(tl.int32, bitcast=True)
    least = 0
    if (outliers > capacity) & (dense == 0):
        beyond = 0x7F800001  # just above +Inf: more than `capacity` − 1 scores never reach it
        while beyond - least > 1:
            middle = least + (beyond - least) // 2
            reach = tl.sum((flagged & (bits >= middle)).to(tl.int32), axis=0)
            enough = reach >= capacity
            least = tl.where(enough, middle, least)
            beyond = tl.where(enough, beyond, middle)
    above = flagged & (bits > least)
    equal = flagged & (bits == least)
    room = capacity - tl.sum(above.to(tl.int32), axis=0)
    chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), axis=0) <= room))
    if AS_LIST:
        place = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
        tl.store(list_ptr + token * f + place, neurons, chosen)
        tl.store(length_ptr + token, tl.where(dense, f, tl.sum(chosen.to(tl.int32), axis=0)))
    else:
        tl.store(chosen_ptr + token * f + neurons, chosen.to(tl.int8), inside)
    tl.store(outliers_ptr + token, outliers)
    tl.store(dense_ptr + token, dense.to(tl.int8))


@triton.jit
def residual_kernel(
    x_ptr, gate_ptr, up_ptr, gate_bias_ptr, up_bias_ptr,
    gate_slope_ptr, up_slope_ptr, intercept_ptr, low_ptr, high_ptr,
    list_ptr, length_ptr, dense_ptr, residual_ptr, value_ptr, d, f,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_GATE_BIAS: tl.constexpr,
    HAS_UP_BIAS: tl.constexpr, CERTIFIED: tl.constexpr, PREDICTED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """value[t, slot] = h − ĥ of the neuron in that slot, or h on the dense path.

    Grid (tokens, blocks of slots); slots beyond the token's list are left alone. With PREDICTED
    no weights are read, unless for the dense path: h − ĥ is known.
    """
    token = tl.program_id(0).to(tl.int64)
    slots = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    length = tl.load(length_ptr + token)
    if tl.program_id(1) * BLOCK_N < length:
        inside = slots < length
        dense = tl.load(dense_ptr + token) != 0
        listed = tl.load(list_ptr + token * f + slots, inside & (dense == 0), 0)
        neurons = tl.where(dense, slots, listed)
        x_ptr += token * d
        read = inside
        if PREDICTED:
            read = inside & dense
        up = row_dot(x_ptr, up_ptr, neurons, read, d, 0, BLOCK_N, BLOCK_D, d)
        if HAS_UP_BIAS:
            up += tl.load(up_bias_ptr + neurons, read, 0.0).to(tl.float32)
        gate = up
        if GATED:
            gate = row_dot(x_ptr, gate_ptr, neurons, read, d, 0, BLOCK_N, BLOCK_D, d)
            if HAS_GATE_BIAS:
                gate += tl.load(gate_bias_ptr + neurons, read, 0.0).to(tl.float32)
        hidden = hidden_value(gate, up, ACTIVATION, GATED)
        if PREDICTED:
            value = tl.load(residual_ptr + token * f + neurons, inside & (dense == 0), 0.0)
        else:
            value = hidden - affine_value(
                gate, up, neurons, inside, gate_slope_ptr, up_slope_ptr, intercept_ptr, GATED
            )
        if CERTIFIED:
            low = tl.load(low_ptr + neurons, inside, 0.0).to(tl.float32)
            high = tl.load(high_ptr + neurons, inside, 0.0).to(tl.float32)
            value = tl.where((up >= low) & (up <= high), 0.0, value)
        tl.store(value_ptr + token * f + slots, tl.where(dense, hidden, value), inside)


@triton.jit
def gather_down_kernel(
    value_ptr, down_ptr, list_ptr, length_ptr, dense_ptr, partial_ptr, d_out, f,
    SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """partial[t, split] = Σ over the split's slots of value · down[neuron].

    Grid (tokens, blocks of output columns, splits).
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    split = tl.program_id(2)
    within = columns < d_out
    length = tl.load(length_ptr + token)
    dense = tl.load(dense_ptr + token) != 0
    total = tl.zeros([BLOCK_N, BLOCK_O], tl.float32)
    for start in range(split * BLOCK_N, length, SPLITS * BLOCK_N):
        slots = start + tl.arange(0, BLOCK_N)
        inside = slots < length
        listed = tl.load(list_ptr + token * f + slots, inside & (dense == 0), 0)
        neurons = tl.where(dense, slots, listed).to(tl.int64)
        value = tl.load(value_ptr + token * f + slots, inside, 0.0)
        place = down_ptr + neurons[:, None] * d_out + columns[None, :]
        rows = tl.load(place, inside[:, None] & within[None, :], 0.0)
        total += value[:, None] * rows.to(tl.float32)
    place = partial_ptr + (token * SPLITS + split) * d_out + columns
    tl.store(place, tl.sum(total, axis=0), within)


@triton.jit
def combine_kernel(
    partial_ptr, affine_ptr, down_bias_ptr, dense_ptr, out_ptr, d_out,
    HAS_DOWN_BIAS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """out[t] = Σ of the splits + (C x + B, or b2 on the dense path).

    Grid (tokens, blocks of output columns).
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    within = columns < d_out
    total = tl.zeros([BLOCK_O], tl.float32)
    for split in range(SPLITS):
        total += tl.load(partial_ptr + (token * SPLITS + split) * d_out + columns, within, 0.0)
    constant = tl.zeros([BLOCK_O], tl.float32)
    if HAS_DOWN_BIAS:
        constant = tl.load(down_bias_ptr + columns, within, 0.0).to(tl.float32)
    affine = tl.load(affine_ptr + token * d_out + columns, within, 0.0)
    dense = tl.load(dense_ptr + token) != 0
    total += tl.where(dense, constant, affine)
    tl.store(out_ptr + token * d_out + columns, total.to(out_ptr.dtype.element_ty), within)
