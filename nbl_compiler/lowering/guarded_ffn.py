"""The folded FFN with a guarded outlier branch: schema, meaning, and fake kernel.

Every neuron's value h = σ(u) (plain: u = W1 x + b1) or h = σ(g)·u (gated: g = W_gate x, u = W_up x)
is replaced by its affine fit ĥ = up_slope·u + gate_slope·g + intercept, and all the fits are folded
into one matrix (TARDIS, arXiv 2501.10054, section 4): y₀ = C x + B. The neurons that the fit serves
badly on this token, its *outliers* S, are put right with gathered rows of the original weights:

    y = C x + B + Σ_{i in S} (h_i − ĥ_i) W2[:, i]

For a gated FFN, TARDIS's one slope becomes two: h depends on x through (g, u) alone.

Which neurons are outliers is decided per token by

* a range test, with ``low`` and ``high``: u outside [low, high] (plain FFNs), or
* a threshold, without them: |h − ĥ|·column_norm > ``threshold``,

on pre-activations that are exact (``predictor_kind="none"``) or predicted. ``guard="exact"`` with a
certified predictor flags every neuron that may be an outlier, then keeps those that are, so that S
is the same as without a predictor. No outlier is missed in either case, and the error obeys the
bound Σ_i |W2[j, i]| max_{z in range_i} |σ(z) − a_i z − c_i| for every input.

With ``values="predicted"`` the correction, too, takes h and ĥ from the predicted pre-activations.
Of an outlier only its column of W2 is read then, so that the same bytes hold two (gated: three)
times as many; their values carry the predictor's error.

A token with more flagged neurons than ``capacity`` takes the dense path (``overflow="dense"``) or
keeps those with the largest |h − ĥ|·column_norm (``overflow="truncate"``). A token whose C x + B is
not finite always takes the dense path: NaN and Inf come out as the dense FFN makes them.

The functions here are the meaning of the op. :mod:`guarded_ffn_inductor` holds the form that
Inductor compiles for CPUs, :mod:`triton_guarded_ffn` the kernels for GPUs.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

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
from nbl_compiler.lowering.predictors import predict


def true_preactivations(site: GuardedFFN, x: Tensor) -> tuple[Tensor | None, Tensor]:
    """g (None for a plain FFN) and u, both [tokens, f], in the dtype of ``x`` [tokens, d]."""
    up = _linear(x, site.up, site.up_bias)
    return (None if site.gate is None else _linear(x, site.gate, site.gate_bias)), up


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def choose(site: GuardedFFN, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return which neurons the guard flags and which it corrects, both bool [tokens, f].

    The second set is S for tokens within the capacity; a token on the dense path is not marked.
    """
    wide = x.reshape(-1, x.shape[-1]).to(compute_dtype(x))
    candidates, score = flagged(site, *_seen(site, wide))
    chosen = candidates & _within_capacity(candidates, score, site.selected)
    if site.certified:
        chosen = chosen & outside_range(site, true_preactivations(site, wide)[1])
    return candidates, chosen


def _seen(site: GuardedFFN, x: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Return g, u and their slack as the guard sees them, for ``x`` [tokens, d]."""
    if site.predictor_kind == "none":
        return *true_preactivations(site, x), None
    prediction = predict(site.predictor_kind, site.predictor, x)
    slack = prediction.slack if site.certified else None
    return *split_rows(site, prediction.value), slack


def correction(site: GuardedFFN, x: Tensor, chosen: Tensor) -> Tensor:
    """Σ_{i chosen} (h_i − ĥ_i) W2[:, i] for ``x`` [tokens, d] and ``chosen`` [tokens, f]."""
    if site.corrects_by_prediction:
        gate, up, _ = _seen(site, x)
    else:
        gate, up = true_preactivations(site, x)
    residual = hidden_values(site, gate, up) - affine_values(site, gate, up)
    return torch.where(chosen, residual, 0.0) @ site.down.to(x.dtype)


def dense_output(site: GuardedFFN, x: Tensor) -> Tensor:
    """The FFN as it was: W2 h + b2 for ``x`` [tokens, d]."""
    hidden = hidden_values(site, *true_preactivations(site, x))
    return _linear(hidden, site.down.T, site.down_bias)


def reference(site: GuardedFFN, x: Tensor) -> GuardedOutput:
    """The meaning of the op, for ``x`` [..., d]: all neurons computed, those outside S masked."""
    wide = x.reshape(-1, x.shape[-1]).to(compute_dtype(x))
    candidates, chosen = choose(site, wide)
    affine = _linear(wide, site.folded, site.folded_bias)
    outliers, dense = overflowing(site, candidates, affine)
    guarded = affine + correction(site, wide, chosen)
    output = torch.where(dense[:, None], dense_output(site, wide), guarded).to(x.dtype)
    return GuardedOutput(output.reshape(*x.shape[:-1], site.down.shape[1]), outliers, dense)


def _within_capacity(candidates: Tensor, score: Tensor, capacity: int) -> Tensor:
    """The ``capacity`` candidates of the largest score per token; of equals, the first."""
    if capacity == 0:
        return torch.zeros_like(candidates)
    key = torch.where(candidates, score, -1.0)
    ranked = torch.where(key.isnan(), torch.inf, key)  # NaN counts as the largest
    least = ranked.topk(capacity, sorted=False).values.amin(-1, keepdim=True)
    chosen = candidates & (ranked >= least)
    if bool((chosen.sum(-1) <= capacity).all()):
        return chosen
    # Equal scores at the limit: a sort, several times slower, tells which comes first.
    order = key.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(candidates).scatter(-1, order[:, :capacity], True)


def put_right(site: GuardedFFN, x: Tensor) -> Tensor:
    """Which neurons come out as in the dense FFN: S, and all of a token on the dense path."""
    candidates, chosen = choose(site, x)
    if site.overflow == "dense":
        chosen = chosen | (candidates.sum(-1, keepdim=True) > site.capacity)
    return chosen


def true_outliers(truth: GuardedFFN, x: Tensor) -> Tensor:
    """What a guard without predictor flags; where the capacity truncates, what it corrects."""
    candidates, chosen = choose(truth, x)
    return candidates if truth.overflow == "dense" else chosen


def unpredicted(site: GuardedFFN) -> GuardedFFN:
    """The same guard without its predictor: it sees the true pre-activations."""
    return replace(site, predictor_kind="none", predictor=[], values="original")


def run(site: GuardedFFN, x: Tensor) -> GuardedOutput:
    """Call the op on ``x`` [..., d]."""
    return GuardedOutput(*torch.ops.nbl.guarded_ffn(x, *site.arguments()))


def unpack_arguments(arguments: tuple[object, ...]) -> GuardedFFN:
    """The op's arguments after x as one value."""
    return GuardedFFN(*arguments)  # type: ignore[arg-type]


@torch.library.custom_op("nbl::guarded_ffn", mutates_args=())
def guarded_ffn(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    folded: Tensor,
    folded_bias: Tensor,
    gate_slope: Tensor | None,
    up_slope: Tensor,
    intercept: Tensor,
    low: Tensor | None,
    high: Tensor | None,
    column_norm: Tensor | None,
    predictor: list[Tensor],
    activation: str,
    predictor_kind: str,
    exact: bool,
    capacity: int,
    overflow: str,
    threshold: float,
    values: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Folded FFN with a guarded outlier branch; arguments as in :class:`GuardedFFN`."""
    arguments = (
        gate, up, down, gate_bias, up_bias, down_bias, folded, folded_bias, gate_slope, up_slope,
        intercept, low, high, column_norm, predictor, activation, predictor_kind, exact, capacity,
        overflow, threshold, values,
    )  # fmt: skip
    return tuple(reference(unpack_arguments(arguments), x))  # type: ignore[return-value]


@guarded_ffn.register_fake
def _(x: Tensor, *arguments: object) -> tuple[Tensor, Tensor, Tensor]:
    site = unpack_arguments(arguments)
    tokens = math.prod(x.shape[:-1])
    return (
        x.new_empty(*x.shape[:-1], site.down.shape[1]),
        x.new_empty(tokens, dtype=torch.int32),
        x.new_empty(tokens, dtype=torch.bool),
    )
