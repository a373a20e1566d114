"""What the two guarded forms share: the op's arguments, and what the plan keeps of them.

    y = FFN_K(x) + C x + B + Σ_{i in S} (h_i − ĥ_i) W2[:, i]

K are the kept neurons, all others are folded into C and B, S are a token's outliers among them.
The plan stores what calibration made (slopes, ranges, C, B, the predictor); the rows of the
original weights are taken from the model when the graph is compiled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nbl_compiler.config import FFN
from nbl_compiler.ffn.sites import FFNSite, site_facts
from nbl_compiler.ffn.stages import ErrorStage
from nbl_compiler.lowering.guarded_site import GuardedFFN
from nbl_compiler.lowering.predictors import fit_low_rank, tensor_bytes
from nbl_compiler.lowering.quantization import fit_quantized
from nbl_compiler.solvers.folding import FFNWeights

LEAST_CAPACITY = 8
"""Capacities are multiples of this: full vectors, and never zero."""

_FLOAT_BYTES = 4


def others(neurons: int, kept: Tensor) -> Tensor:
    """Return the neurons that are not kept, ascending int64."""
    left = torch.ones(neurons, dtype=torch.bool)
    left[kept] = False
    return left.nonzero().view(-1)


def blank(weights: FFNWeights, **settings: Any) -> GuardedFFN:
    """Return the op's arguments for an FFN's neurons with slopes and fold still at zero."""
    f, d = weights.w1.shape
    o = weights.w2.shape[0]
    gated = weights.gated
    zeros = torch.zeros(f, dtype=torch.float32, device=weights.w1.device)
    return GuardedFFN(
        gate=weights.w1.detach() if gated else None,
        up=(weights.w_up if gated else weights.w1).detach(),  # type: ignore[union-attr]
        down=weights.w2.detach().T.contiguous(),
        gate_bias=_detached(weights.b1) if gated else None,
        up_bias=_detached(weights.b_up if gated else weights.b1),
        down_bias=_detached(weights.b2),
        folded=torch.zeros(o, d, device=zeros.device),
        folded_bias=torch.zeros(o, device=zeros.device),
        gate_slope=zeros if gated else None,
        up_slope=zeros,
        intercept=zeros,
        low=settings.pop("low", None),
        high=settings.pop("high", None),
        column_norm=weights.w2.detach().float().norm(dim=0),
        activation=weights.activation,
        **settings,
    )


def make_predictor(
    kind: str, weights: FFNWeights, options: FFN, mean: Tensor, covariance: Tensor, certified: bool
) -> list[Tensor]:
    """Return the tensors of a predictor of these neurons' pre-activations.

    Args:
        kind: ``"none"``, ``"low_rank"``, or ``"quantized_2"``, ``"_4"``, ``"_8"``.
        weights: The folded neurons.
        options: Say the rank.
        mean: E[x], [d].
        covariance: Of x, [d, d].
        certified: Whether the quantized predictor must bound its own error.
    """
    if kind == "none":
        return []
    rows, bias = weights.w1.detach(), _detached(weights.b1)
    if weights.w_up is not None:
        parts = [
            torch.zeros_like(w[:, 0]) if b is None else b.detach()
            for w, b in ((weights.w1, weights.b1), (weights.w_up, weights.b_up))
        ]
        rows, bias = torch.cat([rows, weights.w_up.detach()]), torch.cat(parts)
    rows = rows.float()
    if kind == "low_rank":
        rank = min(options.rank, rows.shape[1])
        return fit_low_rank(rows, bias, rank, covariance, mean).tensors
    bits = int(kind.removeprefix("quantized_"))
    return fit_quantized(rows, bias, bits, mean, certified).tensors


def plan_tensors(guarded: GuardedFFN, kept: Tensor) -> dict[str, Tensor]:
    """Return what the plan stores of a guarded site."""
    stored: dict[str, Tensor | None] = {
        "weight": guarded.folded,
        "bias": guarded.folded_bias,
        "up_slope": guarded.up_slope,
        "gate_slope": guarded.gate_slope,
        "intercept": guarded.intercept,
        "low": guarded.low,
        "high": guarded.high,
    }
    stored |= {f"predictor_{i}": tensor for i, tensor in enumerate(guarded.predictor)}
    made = {name: t.cpu().contiguous() for name, t in stored.items() if t is not None}
    return made | ({"kept": kept.cpu()} if kept.numel() else {})


def guard_details(
    site: FFNSite, kept: Tensor, guarded: GuardedFFN, error: ErrorStage
) -> dict[str, Any]:
    """Return the facts about a guarded site that the plan shows, its settings included."""
    weights = site.weights
    d, o = weights.w1.shape[1], weights.w2.shape[0]
    k, capacity = kept.numel(), guarded.selected
    rows = 2 if weights.gated else 1
    if guarded.predictor_kind == "none":
        predictor, gathered = rows * guarded.neurons * d, o
    else:
        predictor = tensor_bytes(guarded.predictor) // _FLOAT_BYTES
        gathered = o if guarded.corrects_by_prediction else rows * d + o
    slopes = (rows + 1 + 2 * (guarded.low is not None)) * guarded.neurons
    read = k * (rows * d + o) + o * d + o + predictor + capacity * gathered + slopes
    tokens = float(error.outliers.sum()) or 1.0
    mean = float(error.outliers @ torch.arange(error.outliers.numel(), dtype=torch.float64))
    return site_facts(site, "guarded", k) | {
        "parameters_read": read,
        "tokens": int(error.tokens.sum()),
        "guard": "exact" if guarded.exact else "predicted",
        "predictor": str(guarded.predictor_kind),
        "capacity": guarded.capacity,
        "overflow": str(guarded.overflow),
        "threshold": guarded.threshold,
        "values": str(guarded.values),
        "recall": error.recall,
        "outliers_per_token": mean / tokens,
        "dense_tokens": float(error.outliers[guarded.capacity + 1 :].sum()) / tokens
        if guarded.overflow == "dense"
        else 0.0,
    }


def errors_of(stage: ErrorStage) -> tuple[float, float]:
    """Return (training NMSE, held-out NMSE; the former without held-out tokens)."""
    train, holdout = stage.nmse(held=False), stage.nmse(held=True)
    return train, train if float(stage.tokens[1]) == 0 else holdout


def rounded_capacity(wanted: float, neurons: int) -> int:
    """Return a number of neurons, rounded up to a multiple of ``LEAST_CAPACITY``, at most all."""
    count = max(int(-(-wanted // 1)), 1)
    return min(-(-count // LEAST_CAPACITY) * LEAST_CAPACITY, neurons)


def settings_of(details: Mapping[str, Any]) -> dict[str, Any]:
    """Return the op's settings that ``guard_details`` stored."""
    return {
        "predictor_kind": details["predictor"],
        "exact": details["guard"] == "exact",
        "capacity": details["capacity"],
        "overflow": details["overflow"],
        "threshold": details["threshold"],
        "values": details["values"],
    }


def restore(
    weights: FFNWeights, tensors: Mapping[str, Tensor], details: Mapping[str, Any]
) -> GuardedFFN:
    """Return the op's arguments for a plan's site, from the model's weights.

    Args:
        weights: The whole FFN, in the dtype and on the device of the model.
        tensors: What ``plan_tensors`` stored.
        details: What ``guard_details`` said.
    """
    kept = tensors.get("kept", torch.zeros(0, dtype=torch.int64))
    left = others(weights.neurons, kept.cpu())
    folded = replace(weights.select(left), b2=weights.b2)
    device, dtype = weights.w1.device, weights.w1.dtype
    own = {name: tensor.to(device) for name, tensor in tensors.items()}
    predictor = [own[f"predictor_{i}"] for i in range(len(own)) if f"predictor_{i}" in own]
    return replace(
        blank(
            folded,
            low=own.get("low"),
            high=own.get("high"),
            predictor=predictor,
            **settings_of(details),
        ),
        folded=own["weight"].to(dtype),
        folded_bias=own["bias"].to(dtype),
        gate_slope=own.get("gate_slope"),
        up_slope=own["up_slope"],
        intercept=own["intercept"],
    )


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
