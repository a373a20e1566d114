"""One folded FFN with its guard: the tensors, and the formulas that hold neuron by neuron.

Pure functions of tensors, shared by the reference of the op, by the form that Inductor compiles,
and by calibration; :mod:`guarded_ffn` says what they make together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nbl_compiler.errors import ConfigError
from nbl_compiler.lowering.predictors import PREDICTOR_KINDS, PredictorKind

Overflow = Literal["dense", "truncate"]
Values = Literal["original", "predicted"]

QUICK_GELU_SLOPE = 1.702
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "quick_gelu": lambda z: z * torch.sigmoid(QUICK_GELU_SLOPE * z),
    "silu": F.silu,
    "relu": F.relu,
    "relu2": lambda z: F.relu(z).square(),
}


class GuardedOutput(NamedTuple):
    """What the op returns.

    Args:
        output: y [..., d_out], in the dtype of x.
        outliers: Flagged neurons per token, int32 [tokens].
        dense: Which tokens took the dense path, bool [tokens].
    """

    output: Tensor
    outliers: Tensor
    dense: Tensor


@dataclass(frozen=True)
class GuardedFFN:
    """One folded FFN with its guard. The fields are the op's arguments after x, in its order.

    Rows of ``gate``, ``up`` and ``down`` belong to neurons, so that gathering a neuron reads
    contiguous memory: ``down`` is W2ᵀ. Weights may have any floating dtype; sums run in float32
    (float64 for float64 inputs).

    Args:
        gate: W_gate [f, d], or None for a plain FFN.
        up: W_up (gated) or W1 (plain) [f, d].
        down: W2ᵀ [f, d_out].
        gate_bias: [f] or None.
        up_bias: [f] or None.
        down_bias: b2 [d_out] or None.
        folded: C [d_out, d].
        folded_bias: B [d_out], b2 included.
        gate_slope: Slope in g [f], or None for a plain FFN.
        up_slope: Slope in u [f].
        intercept: [f].
        low: Left ends of the ranges [f], or None for a threshold test.
        high: Right ends of the ranges [f].
        column_norm: ‖W2[:, i]‖ [f], or None with ranges and ``overflow="dense"``.
        predictor: The predictor's tensors, rows of ``gate`` first; empty for ``"none"``.
        activation: A key of :data:`ACTIVATIONS`.
        predictor_kind: One of ``PREDICTOR_KINDS``.
        exact: Whether the guard is exact; with a predictor, it must be certified.
        capacity: Most outlier neurons per token.
        overflow: What a token with more flagged neurons than that does.
        threshold: For the threshold test, in units of the output. A negative one flags every
            neuron, and with ``overflow="truncate"`` the capacity alone decides.
        values: What outliers are put right with: ``"original"``, h and ĥ from gathered rows of the
            weights; or ``"predicted"``, both from the predictor's pre-activations, so that of an
            outlier only the row of ``down`` is read.

    Raises:
        ConfigError: if the arguments contradict each other.
    """

    gate: Tensor | None
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None
    folded: Tensor
    folded_bias: Tensor
    gate_slope: Tensor | None
    up_slope: Tensor
    intercept: Tensor
    low: Tensor | None
    high: Tensor | None
    column_norm: Tensor | None
    predictor: list[Tensor] = field(default_factory=list)
    activation: str = "gelu"
    predictor_kind: PredictorKind | str = "none"
    exact: bool = False
    capacity: int = 0
    overflow: Overflow | str = "dense"
    threshold: float = 0.0
    values: Values | str = "original"

    def __post_init__(self) -> None:
        check(self)

    @property
    def neurons(self) -> int:
        """f."""
        return self.up.shape[0]

    @property
    def certified(self) -> bool:
        """Whether a predictor's certificate keeps an exact guard exact."""
        return self.exact and self.predictor_kind != "none"

    @property
    def corrects_by_prediction(self) -> bool:
        """Whether outliers get their predicted values."""
        return self.values == "predicted"

    @property
    def selected(self) -> int:
        """Neurons gathered per token: the capacity, at most f."""
        return min(self.capacity, self.neurons)

    def arguments(self) -> tuple[object, ...]:
        """The op's arguments after x."""
        return tuple(getattr(self, f.name) for f in fields(self))


def check(site: GuardedFFN) -> None:
    """Refuse arguments that contradict each other.

    Raises:
        ConfigError: naming the argument.
    """
    if site.activation not in ACTIVATIONS:
        raise ConfigError(f"activation {site.activation!r} must be one of {', '.join(ACTIVATIONS)}")
    if site.predictor_kind not in PREDICTOR_KINDS:
        raise ConfigError(
            f"predictor_kind {site.predictor_kind!r} must be one of {', '.join(PREDICTOR_KINDS)}"
        )
    if site.overflow not in ("dense", "truncate"):
        raise ConfigError(f"overflow={site.overflow!r} must be 'dense' or 'truncate'")
    if site.capacity < 0:
        raise ConfigError(f"capacity={site.capacity} must be at least 0")
    if (site.gate is None) != (site.gate_slope is None):
        raise ConfigError("gate and gate_slope belong together: give both, or neither")
    if (site.low is None) != (site.high is None):
        raise ConfigError("low and high belong together: give both, or neither")
    if site.low is not None and site.gate is not None:
        raise ConfigError("a gated FFN has no ranges; its outliers are found by the threshold")
    if site.column_norm is None and (site.low is None or site.overflow == "truncate"):
        raise ConfigError("column_norm is needed for the threshold test and to truncate")
    if site.exact and site.overflow == "truncate":
        raise ConfigError("an exact guard cannot truncate: use overflow='dense'")
    if site.values not in ("original", "predicted"):
        raise ConfigError(f"values={site.values!r} must be 'original' or 'predicted'")
    if site.corrects_by_prediction and (site.exact or site.predictor_kind == "none"):
        raise ConfigError("values='predicted' needs a predictor and a guard that is not exact")
    if site.certified and (site.low is None or len(site.predictor) != _CERTIFIED_TENSORS):
        raise ConfigError("an exact guard with a predictor needs ranges and a certified predictor")


_CERTIFIED_TENSORS = 7
"""Tensors of a quantized predictor in its certified form."""


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def hidden_values(site: GuardedFFN, gate: Tensor | None, up: Tensor) -> Tensor:
    """h = σ(g)·u or σ(u), elementwise."""
    activate = ACTIVATIONS[site.activation]
    return activate(up) if gate is None else activate(gate) * up


def affine_values(
    site: GuardedFFN, gate: Tensor | None, up: Tensor, neurons: Tensor | None = None
) -> Tensor:
    """ĥ of all f neurons, or of those named per token: ``up`` and ``neurons`` [tokens, k]."""
    slope, intercept, gate_slope = site.up_slope, site.intercept, site.gate_slope
    if neurons is not None:
        slope, intercept = slope[neurons], intercept[neurons]
        gate_slope = None if gate_slope is None else gate_slope[neurons]
    fit = slope.to(up.dtype) * up + intercept.to(up.dtype)
    if gate is None or gate_slope is None:
        return fit
    return fit + gate_slope.to(up.dtype) * gate


def split_rows(site: GuardedFFN, stacked: Tensor) -> tuple[Tensor | None, Tensor]:
    """Split [tokens, 2 f] into gate and up for a gated FFN; (None, [tokens, f]) for a plain one."""
    if site.gate is None:
        return None, stacked
    return stacked[:, : site.neurons], stacked[:, site.neurons :]


def flagged(
    site: GuardedFFN, gate: Tensor | None, up: Tensor, slack: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return which neurons are flagged, bool [tokens, f], and their score [tokens, f].

    NaN pre-activations are flagged. The score, |h − ĥ|·column_norm, ranks neurons where the
    capacity truncates; it is 1 where nothing needs a rank.
    """
    if site.column_norm is None:
        score = torch.ones_like(up)
    else:
        residual = hidden_values(site, gate, up) - affine_values(site, gate, up)
        score = residual.abs() * site.column_norm.to(up.dtype)
    if site.low is None or site.high is None:
        return ~(score <= site.threshold), score
    margin = 0.0 if slack is None else slack
    inside = (up - margin >= site.low.to(up.dtype)) & (up + margin <= site.high.to(up.dtype))
    return ~inside, score


def outside_range(site: GuardedFFN, up: Tensor, neurons: Tensor | None = None) -> Tensor:
    """Which pre-activations lie outside their neuron's range; NaN does. Without ranges, all do.

    ``up`` is [tokens, f], or [tokens, k] for the ``neurons`` [tokens, k].
    """
    if site.low is None or site.high is None:
        return torch.ones_like(up, dtype=torch.bool)
    low, high = (t if neurons is None else t[neurons] for t in (site.low, site.high))
    return ~((up >= low.to(up.dtype)) & (up <= high.to(up.dtype)))


def overflowing(site: GuardedFFN, candidates: Tensor, affine: Tensor) -> tuple[Tensor, Tensor]:
    """Return the flagged neurons per token, int32 [tokens], and who takes the dense path, bool.

    Args:
        candidates: Flagged neurons, bool [tokens, f].
        affine: C x + B [tokens, d_out].
    """
    outliers = candidates.sum(-1, dtype=torch.int32)
    dense = ~affine.isfinite().all(-1)
    if site.overflow == "dense":
        dense = dense | (outliers > site.capacity)
    return outliers, dense
