"""The guarded FFN in the form that Inductor compiles for CPUs.

Up to :data:`GATHER_TOKENS` tokens, each token gathers its own outlier rows: the products are
written as multiply-and-sum, which Inductor fuses with the gather (no row is copied), with the
unpacking of quantized weights and with the conversion of half-precision weights. It also streams a
matrix at M = 1 faster than ATen's ``linear``. Beyond that, tokens share rows so much
that all neurons are computed and masked, in matrix products. Both compute what the reference does.

The dense path is a ``cond`` on whether any token needs it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.cond import cond_op

from nbl_compiler.lowering.guarded_ffn import unpack_arguments
from nbl_compiler.lowering.guarded_site import (
    GuardedFFN,
    GuardedOutput,
    affine_values,
    compute_dtype,
    flagged,
    hidden_values,
    outside_range,
    overflowing,
    split_rows,
)
from nbl_compiler.lowering.predictors import BITS_OF_KIND, Prediction, certified_slack, predict
from nbl_compiler.lowering.streamed_codes import code_sums
from nbl_compiler.lowering.streamed_linear import streamed_product
from nbl_compiler.lowering.widened import register_widened, widened

GATHER_TOKENS = 8
"""Most tokens that gather rows each for themselves. Measured at d 896 and f 4,864: from 16 tokens
on ATen's matrix product is faster than a fused multiply-and-sum."""

ROWS_AT_A_TIME = 4
"""Few: each is a term of the loop. 4, 8 and 16 take about the same time at d 640."""


def register_guarded_ffn() -> None:
    """Teach Inductor the op: :func:`traceable` on CPUs, the Triton kernels where there is a GPU.

    Call it before Inductor compiles a graph that holds the op; further calls do nothing. Without
    it, the op runs its reference.
    """
    from torch._inductor.decomposition import (
        decompositions,
        fast_random_decomps,
        register_decomposition,
    )
    from torch.utils._triton import has_triton

    register_widened()
    op = torch.ops.nbl.guarded_ffn.default
    if op not in decompositions:
        register_decomposition([op])(_decomposition)
        # Inductor keeps the table it used first: a graph compiled before would hide the new entry.
        fast_random_decomps.cache_clear()
    if has_triton():
        from nbl_compiler.lowering import triton_guarded_ffn  # noqa: F401  registers its kernels


def _decomposition(x: Tensor, *arguments: object) -> tuple[Tensor, Tensor, Tensor]:
    if x.device.type != "cpu":
        return NotImplemented  # type: ignore[no-any-return]  # the op stays: its own kernel runs
    return traceable(unpack_arguments(arguments), x)


def traceable(site: GuardedFFN, x: Tensor) -> GuardedOutput:
    """Compute the op on ``x`` [..., d] in operations that Inductor fuses."""
    wide = x.reshape(-1, x.shape[-1]).to(compute_dtype(x))
    compute = _gathered if _few(wide) else _masked
    output, outliers, dense = compute(site, wide)
    output = output.to(x.dtype).reshape(*x.shape[:-1], site.down.shape[1])
    return GuardedOutput(output, outliers, dense)


def _few(x: Tensor) -> bool:
    return 0 < x.shape[0] <= GATHER_TOKENS


def product(x: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    """x rowsᵀ + bias: [tokens, d] and [n, d] to [tokens, n]."""
    if not _few(x):
        return F.linear(x, rows.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return streamed_product(x, rows, bias)


def fused_prediction(kind: str, tensors: Sequence[Tensor], x: Tensor) -> Prediction:
    """:func:`predictors.predict`; for a few tokens codes are unpacked in registers."""
    if kind == "low_rank":
        basis, coefficients, offset = tensors
        return Prediction(product(product(x, basis, None), coefficients, offset), None)
    if not _few(x):
        return predict(kind, tensors, x)
    codes, scale, shift, offset = tensors[:4]
    sums = code_sums(x, codes, BITS_OF_KIND[kind])
    value = sums * scale + x.sum(-1, keepdim=True) * shift + offset
    return Prediction(value.to(x.dtype), certified_slack(tensors, x))


def _gathered(site: GuardedFFN, x: Tensor) -> GuardedOutput:
    affine = product(x, site.folded, site.folded_bias)
    if site.predictor_kind == "none":
        gate, up = _all_neurons(site, x)
        candidates, score = flagged(site, gate, up, None)
        neurons, valid = _select(candidates, score, site.selected)
        gate = None if gate is None else gate.gather(1, neurons)
        up = up.gather(1, neurons)
    else:
        prediction = fused_prediction(site.predictor_kind, site.predictor, x)
        slack = prediction.slack if site.certified else None
        candidates, score = flagged(site, *split_rows(site, prediction.value), slack)
        neurons, valid = _select(candidates, score, site.selected)
        if site.corrects_by_prediction:
            seen_gate, seen_up = split_rows(site, prediction.value)
            gate = None if seen_gate is None else seen_gate.gather(1, neurons)
            up = seen_up.gather(1, neurons)
        else:
            gate = None if site.gate is None else _rows(x, site.gate, site.gate_bias, neurons)
            up = _rows(x, site.up, site.up_bias, neurons)
    if site.certified:
        valid = valid & outside_range(site, up, neurons)
    residual = hidden_values(site, gate, up) - affine_values(site, gate, up, neurons)
    residual = torch.where(valid, residual, 0.0)
    guarded = affine + _weighted_rows(residual, site.down, neurons)
    outliers, dense = overflowing(site, candidates, affine)
    return GuardedOutput(_with_dense_tokens(site, x, guarded, dense), outliers, dense)


def _masked(site: GuardedFFN, x: Tensor) -> GuardedOutput:
    affine = product(x, site.folded, site.folded_bias)
    slack = None
    if site.predictor_kind != "none":
        prediction = fused_prediction(site.predictor_kind, site.predictor, x)
        seen_gate, seen_up = split_rows(site, prediction.value)
        slack = prediction.slack if site.certified else None
    if site.corrects_by_prediction:
        gate, up = seen_gate, seen_up
    else:
        gate, up = _all_neurons(site, x)
    if site.predictor_kind == "none":
        seen_gate, seen_up = gate, up
    candidates, score = flagged(site, seen_gate, seen_up, slack)
    outliers, dense = overflowing(site, candidates, affine)
    chosen = candidates
    if site.overflow == "truncate":
        neurons, valid = _select(candidates, score, site.selected)
        slots = torch.where(valid, neurons, site.neurons)  # one column more, for unused slots
        chosen = F.pad(torch.zeros_like(candidates), (0, 1)).scatter(1, slots, True)[:, :-1]
    if site.certified:
        chosen = chosen & outside_range(site, up)
    hidden = hidden_values(site, gate, up)
    correction = torch.where(chosen, hidden - affine_values(site, gate, up), 0.0)
    if site.corrects_by_prediction:  # the dense path would need the true hidden values
        guarded = affine + correction @ site.down.to(x.dtype)
        return GuardedOutput(_with_dense_tokens(site, x, guarded, dense), outliers, dense)
    rows = torch.where(dense[:, None], hidden, correction)
    bias = torch.zeros_like(affine[:1]) if site.down_bias is None else site.down_bias.to(x.dtype)
    constant = torch.where(dense[:, None], bias, affine)
    return GuardedOutput(constant + rows @ site.down.to(x.dtype), outliers, dense)


def _all_neurons(site: GuardedFFN, x: Tensor) -> tuple[Tensor | None, Tensor]:
    up = product(x, site.up, site.up_bias)
    return (None if site.gate is None else product(x, site.gate, site.gate_bias)), up


def _select(candidates: Tensor, score: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Indices of the chosen neurons [tokens, capacity], and which of the slots are in use.

    Unused slots name neuron 0: its row stays in cache, so they cost no memory traffic.
    """
    key, neurons = torch.where(candidates, score, -1.0).topk(capacity, dim=-1, sorted=False)
    valid = ~(key < 0)
    return torch.where(valid, neurons, 0), valid


def _rows(x: Tensor, rows: Tensor, bias: Tensor | None, neurons: Tensor) -> Tensor:
    """x · rows[neurons] (+ bias): [tokens, capacity]."""
    value = (rows[neurons].to(x.dtype) * x[:, None]).sum(-1)
    return value if bias is None else value + bias[neurons].to(x.dtype)


def _weighted_rows(weights: Tensor, rows: Tensor, chosen: Tensor) -> Tensor:
    """Σ_k weights_tk rows[chosen_tk]: [tokens, k] and [n, d] to [tokens, d].

    As one sum, Inductor makes a vector of one number each of many rows. So a few rows at a time are
    terms of an expression, which it computes along the rows, and keeps; their sum is cheap.
    """
    missing = -weights.shape[1] % ROWS_AT_A_TIME
    some = (-1, ROWS_AT_A_TIME)
    weights = F.pad(weights, (0, missing)).unflatten(1, some)
    chosen = F.pad(chosen, (0, missing)).unflatten(1, some)
    first, *others = (
        weights[:, :, i, None] * rows[chosen[:, :, i]].to(weights.dtype)
        for i in range(ROWS_AT_A_TIME)
    )
    partial = sum(others, first)
    if partial.dtype == torch.float32:
        partial = widened(partial)
    return partial.sum(1)


def _with_dense_tokens(site: GuardedFFN, x: Tensor, guarded: Tensor, dense: Tensor) -> Tensor:
    """Replace the tokens on the dense path by the dense FFN's output, if there are any."""
    weights = (site.gate, site.up, site.down, site.gate_bias, site.up_bias, site.down_bias)
    present = [w is not None for w in weights]

    def exact(x: Tensor, *given: Tensor) -> tuple[Tensor]:
        rest = iter(given)
        gate, up, down, gate_bias, up_bias, down_bias = (
            next(rest).to(x.dtype) if there else None for there in present
        )
        assert up is not None
        assert down is not None
        values = F.linear(x, up, up_bias)
        gates = None if gate is None else F.linear(x, gate, gate_bias)
        return (F.linear(hidden_values(site, gates, values), down.t(), down_bias),)

    def nothing(x: Tensor, *_: Tensor) -> tuple[Tensor]:
        return (x.new_zeros(x.shape[0], site.down.shape[1]),)

    operands = (x.contiguous(), *(w for w in weights if w is not None))
    (values,) = cond_op(dense.any(), exact, nothing, operands)
    return torch.where(dense[:, None], values, guarded)
