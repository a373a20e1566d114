# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Device functions that the Triton kernels of the guarded FFN share.

Tensors named ``*_ptr`` may be any pointer where the flag that announces them is false: Triton
removes the branch that would read them.
"""

from __future__ import annotations

import triton
import triton.language as tl

KIND_WEIGHTS = tl.constexpr(0)
"""Pre-activations come from rows of floating-point numbers; 2, 4 and 8 are bits of a code."""


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """σ(z) in float32, by the names of ``guarded_ffn.ACTIVATIONS``."""
    if ACTIVATION == "gelu":
        value = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        value = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif ACTIVATION == "quick_gelu":
        value = z * tl.sigmoid(1.702 * z)
    elif ACTIVATION == "silu":
        value = z * tl.sigmoid(z)
    else:
        tl.static_assert(ACTIVATION == "relu" or ACTIVATION == "relu2")
        value = tl.where(z <= 0.0, 0.0, z)  # NaN stays NaN
        if ACTIVATION == "relu2":
            value = value * value
    return value


@triton.jit
def hidden_value(gate, up, ACTIVATION: tl.constexpr, GATED: tl.constexpr):
    """h = σ(g)·u, or σ(u) of a plain FFN, which has no g."""
    return activate(gate, ACTIVATION) * up if GATED else activate(up, ACTIVATION)


@triton.jit
def affine_value(
    gate, up, neurons, inside, gate_slope_ptr, up_slope_ptr, intercept_ptr, GATED: tl.constexpr
):
    """ĥ of the given neurons; ``gate`` and ``up`` broadcast against ``neurons``."""
    fit = up * tl.load(up_slope_ptr + neurons, inside, 0.0).to(tl.float32)
    fit += tl.load(intercept_ptr + neurons, inside, 0.0).to(tl.float32)
    if GATED:
        fit += gate * tl.load(gate_slope_ptr + neurons, inside, 0.0).to(tl.float32)
    return fit


@triton.jit
def flag_key(
    gate, up, slack, neurons, inside,
    gate_slope_ptr, up_slope_ptr, intercept_ptr, low_ptr, high_ptr, column_norm_ptr, threshold,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, RANGED: tl.constexpr, SCORED: tl.constexpr,
):  # fmt: skip
    """Score of each flagged neuron, −1 for the others; a NaN score ranks first."""
    score = up * 0.0 + 1.0
    if SCORED:
        fit = affine_value(
            gate, up, neurons, inside, gate_slope_ptr, up_slope_ptr, intercept_ptr, GATED
        )
        residual = hidden_value(gate, up, ACTIVATION, GATED) - fit
        score = tl.abs(residual) * tl.load(column_norm_ptr + neurons, inside, 0.0).to(tl.float32)
    if RANGED:
        low = tl.load(low_ptr + neurons, inside, 0.0).to(tl.float32)
        high = tl.load(high_ptr + neurons, inside, 0.0).to(tl.float32)
        keep = (up - slack >= low) & (up + slack <= high)
    else:
        keep = score <= threshold
    score = tl.where(score == score, score, float("inf"))
    return tl.where(keep, -1.0, score)


@triton.jit
def row_dot(
    x_ptr, rows_ptr, rows, inside, width,
    BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, columns,
):  # fmt: skip
    """Σ_j rows[i, j] x[j] of the given rows, float32 [BLOCK_N].

    With BITS 0, ``rows_ptr`` holds floating-point rows of ``columns`` entries. Otherwise it holds
    planar codes in rows of ``width`` bytes, and the result is Σ_j code_ij x_j.
    """
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    base = rows_ptr + rows.to(tl.int64)[:, None] * width
    for start in range(0, width, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        within = column < width
        block = tl.load(base + column[None, :], inside[:, None] & within[None, :], 0)
        if BITS == 0:
            x = tl.load(x_ptr + column, within, 0.0).to(tl.float32)
            total += block.to(tl.float32) * x[None, :]
        else:
            for plane in tl.static_range(8 // BITS):
                place = plane * width + column
                x = tl.load(x_ptr + place, within & (place < columns), 0.0).to(tl.float32)
                codes = (block >> (BITS * plane)) & (2**BITS - 1)
                total += codes.to(tl.float32) * x[None, :]
    return tl.sum(total, axis=1)


@triton.jit
def dequantize(dot, x_sum, rows, inside, scale_ptr, shift_ptr):
    """Σ_j code_ij x_j as Σ_j ŵ_ij x_j."""
    scale = tl.load(scale_ptr + rows, inside, 0.0)
    return dot * scale + x_sum * tl.load(shift_ptr + rows, inside, 0.0)
