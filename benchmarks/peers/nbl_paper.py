"""NBL as published: the residual stream as input, the order of the CCA bound, no ridge.

Erdogan et al. 2025, arXiv 2505.21077: y = W x + b by the linear minimum mean squared error
(section 3), layers ranked by Σ (1 − ρ_i²) (theorem 3.2). The published recipe, with the mathematics
of this package (in float64, moments in one pass).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from nbl_compiler.calibration import Calibrated, observe_model
from nbl_compiler.config import Attention, Config
from nbl_compiler.plans import Plan
from peers.ffn_inputs import Batch


def observe(model: nn.Module, batches: Sequence[Batch]) -> Calibrated:
    """Calibrate once, for any number of layers."""
    recipe = Config(Attention(count=1, input="residual", rank_by="cca"), ridge=0.0)
    return observe_model(model, batches, recipe, progress=False)


def published(calibrated: Calibrated, count: int) -> Plan:
    """Return the plan that replaces the ``count`` best layers."""
    return calibrated.plan(Attention(count=count, input="residual", rank_by="cca"))
