"""What ``nbl.calibrate`` refuses, and what it says then."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch._dynamo
from helpers.tiny import Wrapped, calibrated, compiled, config, output, text, texts, tiny
from torch import nn

import nbl_compiler as nbl
from nbl_compiler.errors import CalibrationError, ConfigError, UnsupportedDtypeError


@pytest.mark.parametrize("part", [None, "body.encoder.layer.1.attention.self.dropout"])
def test_training_mode(part: str | None) -> None:
    model = Wrapped(tiny("bert")).eval()
    (model if part is None else model.get_submodule(part)).train()
    with pytest.raises(nbl.errors.InferenceOnlyError, match=r"training mode; call model\.eval"):
        calibrated(model)


@pytest.mark.parametrize("batches", [[], iter(())])
def test_no_batches(batches: Any) -> None:
    with pytest.raises(CalibrationError, match="no attention or FFN site was seen: were there any"):
        nbl.calibrate(tiny(layers=1), batches, progress=False)


def test_no_transformer() -> None:
    with pytest.raises(CalibrationError, match="is this a transformer"):
        nbl.calibrate(nn.Linear(4, 4).eval(), [torch.randn(20, 4)], progress=False)


@pytest.mark.parametrize("tokens", [1, 15])
def test_too_few_tokens(tokens: int) -> None:
    message = rf"model\.layers\.0\.self_attn saw {tokens} calibration tokens; give at least 16"
    with pytest.raises(CalibrationError, match=message):
        nbl.calibrate(tiny(layers=1), [text(1, tokens)], config(holdout=0.0), progress=False)


@pytest.mark.parametrize("ridge", [0.0, "auto"])
def test_fewer_tokens_than_dimensions_are_enough_for_a_finite_plan(ridge: float | str) -> None:
    model = tiny(layers=1)
    plan = nbl.calibrate(
        model, [text(1, 20)], config(holdout=0.0, ridge=ridge, layers=(0,)), progress=False
    )
    assert all(torch.isfinite(t).all() for t in plan.tensors().values())
    assert torch.isfinite(output(compiled(model), text())).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("pending", [False, True])
def test_activations_that_are_not_finite(value: float, pending: bool) -> None:
    """Found in a whole block of rows, and in the rows left over at the end."""
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[3, 4] = value
    batch = text(4, 48) if pending else text(32, 48)
    message = r"model\.layers\.1\.self_attn: activations hold NaN or infinity; check the model"
    with pytest.raises(CalibrationError, match=message):
        nbl.calibrate(model, [batch], progress=False)


@pytest.mark.parametrize(
    ("batch", "kind"), [(["a text"], "str"), ([1, 2, 3], "list"), (None, "NoneType")]
)
def test_batches_of_the_wrong_kind(batch: Any, kind: str) -> None:
    with pytest.raises(CalibrationError, match=f"token id tensors .* it gave a {kind}"):
        nbl.calibrate(tiny(layers=1), [batch], progress=False)


def test_a_mapping_instead_of_batches() -> None:
    with pytest.raises(CalibrationError, match="it gave a str"):
        nbl.calibrate(tiny(layers=1), {"input_ids": text()}, progress=False)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_dtypes_without_linear_maps(dtype: torch.dtype) -> None:
    model = tiny().to(dtype)
    message = f"model.embed_tokens.weight is stored in {dtype}; load the model in float32"
    with pytest.raises(UnsupportedDtypeError, match=message):
        calibrated(model)


def test_quantized_projections_are_rejected_with_their_reason() -> None:
    model = tiny(layers=1)
    with warnings.catch_warnings():  # torch deprecates its own quantization
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    plan = calibrated(model)
    assert [s.decision for s in plan.sites] == ["rejected"]


def test_nothing_to_calibrate() -> None:
    with pytest.raises(ConfigError, match="leaves everything alone"):
        nbl.calibrate(tiny(), texts(), nbl.Config(attention=None), progress=False)
