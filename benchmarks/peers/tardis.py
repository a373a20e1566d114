"""TARDIS as published: every neuron folded on its hot range, a 2-bit predictor, outliers repaired.

    y = C x + B + Σ_{i predicted outside} (σ(z_i) − a_i z_i − c_i) W2[:, i]

arXiv 2501.10054, sections 3 to 5: ranges from calibration under one in-range target, W1 quantized
to 2 bits as the predictor, its false negatives pass silently. The published recipe with the ranges
and fold of this package, whose certificate, which would catch those, is taken off. The paper treats
plain FFNs only, and so does this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from nbl_compiler.calibration import observe_model
from nbl_compiler.config import FFN, Config
from nbl_compiler.plans import Plan, Site
from peers.does_not_apply import DoesNotApply
from peers.ffn_inputs import Batch
from peers.ffn_modules import find_ffns

_CERTIFICATE = ("predictor_4", "predictor_5", "predictor_6", "bound")
"""What makes the guard exact: the predictor's error bounds, and the bound that follows."""
EVERY = 1e9
"""No error is too large: all FFNs are folded."""


def tardis(model: nn.Module, batches: Sequence[Batch], coverage: float) -> Plan:
    """Return the plan with all FFNs folded.

    Args:
        model: With plain FFNs.
        batches: Calibration text.
        coverage: In-range target, the share of pre-activations that the ranges hold.

    Raises:
        DoesNotApply: if the FFNs are gated.
    """
    if any(ffn.gated for ffn in find_ffns(model)):
        raise DoesNotApply(
            "the paper folds plain FFNs only: a gated neuron is no function of one pre-activation "
            "(keep+fold and the guarded form extend it)"
        )
    recipe = FFN(
        max_nmse=EVERY, keep=0.0, guard="exact", coverage=coverage, predictor="quantized_2"
    )
    plan = observe_model(model, batches, Config(None, recipe), progress=False).plan()
    return replace(plan, sites=tuple(map(_without_certificate, plan.sites)))


def _without_certificate(site: Site) -> Site:
    if site.decision != "rewritten":
        return site
    tensors = {name: t for name, t in site.tensors.items() if name not in _CERTIFICATE}
    return replace(site, tensors=tensors, details={**site.details, "guard": "predicted"})
