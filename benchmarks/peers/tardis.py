"""TARDIS as published: every neuron folded on its hot range, a 2-bit predictor, outliers repaired.

    y = C x + B + Σ_{i predicted outside} (σ(z_i) − a_i z_i − c_i) W2[:, i]

arXiv 2501.10054, sections 3 to 5: ranges from calibration under one in-range target, W1 quantized
to 2 bits as the predictor, as many outliers repaired as it finds, and those it overlooks pass
silently. The published recipe with the ranges, the fold and the quantizer of this package. The
paper treats plain FFNs only, and so does this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from nbl_compiler.calibration import observe_model
from nbl_compiler.config import FFN, Config
from nbl_compiler.lowering.predictors import tensor_bytes
from nbl_compiler.lowering.quantization import fit_quantized
from nbl_compiler.plans import Plan, Site
from peers.does_not_apply import DoesNotApply
from peers.ffn_inputs import Batch, visit_ffns
from peers.ffn_modules import FFNModules, find_ffns

BITS = 2
"""Of the predictor, as in the paper."""
EVERY = 1e9
"""No error is too large: all FFNs are folded."""
_FLOAT_BYTES = 4


def tardis(model: nn.Module, batches: Sequence[Batch], coverage: float) -> Plan:
    """Return the plan with all FFNs folded.

    Args:
        model: With plain FFNs.
        batches: Calibration text.
        coverage: In-range target, the share of pre-activations that the ranges hold.

    Raises:
        DoesNotApply: if the FFNs are gated.
    """
    every = find_ffns(model)
    if any(ffn.gated for ffn in every):
        raise DoesNotApply(
            "the paper folds plain FFNs only: a gated neuron is no function of one pre-activation "
            "(keep+fold and the guarded form extend it)"
        )
    means: dict[str, Tensor] = {}
    visit_ffns(model, batches, lambda ffn, x: means.update({ffn.name: x.float().mean(0)}))
    recipe = FFN(max_nmse=EVERY, keep=0.0, guard="exact", coverage=coverage)
    plan = observe_model(model, batches, Config(None, recipe), progress=False).plan()
    pairs = zip(plan.sites, every, strict=True)  # both in the model's order
    return replace(plan, sites=tuple(_predicted(s, ffn, means[ffn.name]) for s, ffn in pairs))


def _predicted(site: Site, ffn: FFNModules, mean: Tensor) -> Site:
    """Return the site with a predictor in the place of the true pre-activations."""
    first = ffn.linear(ffn.rows[0])
    bias = None if first.bias is None else first.bias.detach()
    predictor = fit_quantized(first.weight.detach().float(), bias, BITS, mean, False).tensors
    tensors = {name: tensor for name, tensor in site.tensors.items() if name != "bound"}
    tensors |= {f"predictor_{i}": tensor for i, tensor in enumerate(predictor)}
    neurons, width = first.weight.shape
    outliers = float(site.details["outliers_per_token"])
    slopes = 4 * neurons  # slope, intercept and both ends of the range
    read = site.tensors["weight"].numel() + width + tensor_bytes(predictor) / _FLOAT_BYTES
    changed = {
        "guard": "predicted",
        "predictor": f"quantized_{BITS}",
        "capacity": neurons,  # all that it finds
        "parameters_read": round(read + slopes + outliers * 2 * width),
    }
    return replace(site, tensors=tensors, details={**site.details, **changed})
