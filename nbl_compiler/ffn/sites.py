"""One FFN site as calibration sees it, and its fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from nbl_compiler.fingerprint import Sketch
from nbl_compiler.solvers.folding import FFNWeights

Form = Literal["keep+fold", "guarded"]


@dataclass(frozen=True)
class FFNSite:
    """One matched FFN with its weights.

    Args:
        name: Name of the site.
        weights: The model's own weights (views of them), not copies.
        sketches: Of the parameters that the region reads.
        parameters: How many numbers they hold.
    """

    name: str
    weights: FFNWeights
    sketches: tuple[Sketch, ...]
    parameters: int


def site_facts(site: FFNSite, form: Form, kept: int) -> dict[str, Any]:
    """Return the facts that the plan stores of a folded site, whatever its form."""
    weights = site.weights
    return {
        "form": form,
        "activation": weights.activation,
        "gated": weights.gated,
        "neurons": weights.neurons,
        "kept": kept,
        "width_in": weights.w1.shape[1],
        "width_out": weights.w2.shape[0],
        "parameters": site.parameters,
    }


@dataclass(frozen=True)
class FFNFit:
    """A folded FFN, not yet decided on.

    Args:
        name: Name of the site.
        nmse: Training NMSE of y.
        holdout_nmse: NMSE on held-out rows (training rows without any).
        tensors: What the plan stores (see ``nbl_compiler.plans.Site``).
        details: Plain facts for the plan.
        refusal: Why this site cannot be folded as asked, or an empty string.
        inputs: The distribution of x over the calibration text (``Site.inputs``).
        loss_rank: Its place in the order that least disturbs the model, if that was measured.
    """

    name: str
    nmse: float = float("nan")
    holdout_nmse: float = float("nan")
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    refusal: str = ""
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    loss_rank: int | None = None


@dataclass(frozen=True)
class FFNRows:
    """Some tokens' activations at one site.

    Args:
        x: What the projections read, [n, d].
        hidden: What the down projection reads, [n, f].
        output: y, [n, o].
    """

    x: Tensor
    hidden: Tensor
    output: Tensor

    def select(self, rows: Tensor) -> FFNRows:
        """Return these tokens alone ([m] int64)."""
        if rows.numel() == self.x.shape[0]:
            return self
        parts = (self.x, self.hidden, self.output)
        return FFNRows(*(part.index_select(0, rows) for part in parts))
