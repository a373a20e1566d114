"""What can be calibrated, and what was seen enough of."""

from __future__ import annotations

from torch import nn

from nbl_compiler.errors import CalibrationError, InferenceOnlyError, UnsupportedDtypeError
from nbl_compiler.ffn.stages import NeuronStage
from nbl_compiler.int8_weights import is_quantized
from nbl_compiler.observe import Observation
from nbl_compiler.passes.rewrite_sites import SUPPORTED_DTYPES
from nbl_compiler.released_weights import refuse_released

# Below this many rows no map is worth solving; up to a few times the width, cross-validation and
# the ridge still find a usable one.
MIN_TOKENS = 16


def check_request(model: nn.Module) -> None:
    """Raise unless the model can be calibrated as it is.

    Raises:
        InferenceOnlyError: if the model is in training mode.
        UnsupportedDtypeError: if a weight is quantized, or stored in a dtype that has no linear
            maps here.
        WeightsReleasedError: if weights were released for a plan.
    """
    if any(module.training for module in (model, *_dropouts(model))):
        raise InferenceOnlyError("the model is in training mode; call model.eval() first")
    refuse_released(model.parameters(), "calibration")
    for name, weight in model.named_parameters():
        if is_quantized(weight):
            raise UnsupportedDtypeError(
                f"{name} is quantized; calibrate the model as it was loaded, quantize it then: the "
                "plan applies to the quantized model"
            )
        computes = weight.is_floating_point() or weight.is_complex()
        if computes and weight.dtype not in SUPPORTED_DTYPES:
            raise UnsupportedDtypeError(
                f"{name} is stored in {weight.dtype}; load the model in float32, bfloat16 or "
                "float16 to calibrate it"
            )


def _dropouts(model: nn.Module) -> list[nn.Module]:
    kind = nn.modules.dropout._DropoutNd
    return [module for module in model.modules() if isinstance(module, kind) and module.p > 0]


def check_tokens(observation: Observation) -> None:
    """Raise unless there were sites, and every one saw enough tokens.

    Raises:
        CalibrationError: naming the site that did not.
    """
    ffn = observation.ffn
    counts = {name: site.train.count for name, site in observation.sites.items()}
    if ffn is not None:
        stages = ffn.stages.items()
        counts |= {n: s.moments.count for n, s in stages if isinstance(s, NeuronStage)}
    if not counts and not observation.rejected and not (ffn and ffn.rejected):
        raise CalibrationError(
            "no attention or FFN site was seen: were there any batches, and is this a transformer?"
        )
    for name, count in counts.items():
        if count < MIN_TOKENS:
            raise CalibrationError(
                f"{name} saw {count} calibration tokens; give at least {MIN_TOKENS} "
                "(tens of thousands for a good fit)"
            )
