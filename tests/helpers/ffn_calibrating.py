"""What FFN calibration must find, recomputed in plain torch, and the comparison of two plans.

Nothing here may import transformers: spawned processes import it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from helpers.own_ffn import OwnModel, own_model
from torch import Tensor

import nbl_compiler as nbl
from nbl_compiler.rows import RowChooser

GRID = 64.0

FORMS: dict[str, dict[str, Any]] = {
    "folded": {"keep": 0},
    "kept": {"keep": 0.25},
    "predicted": {"keep": 0.25, "guard": "predicted", "capacity": 0.3},
    "predicted values": {"keep": 0, "guard": "predicted", "values": "predicted"},
    "exact": {"keep": 0.25, "guard": "exact"},
    "exact, 8 bits": {"keep": 0, "guard": "exact", "predictor": "quantized_8"},
}
"""Options of ``nbl.FFN`` by name: every form that a plan can hold."""


def on_a_grid(tensor: Tensor) -> Tensor:
    """Round to multiples of 1/64.

    Products of two such numbers below 16 are multiples of 2⁻¹², and some ten of them add up below
    2¹²: pre-activations are then exact in float32, in whatever order and batch they are computed.
    """
    return (tensor * GRID).round() / GRID


def grid_model(*gated: bool) -> OwnModel:
    """Return ``own_model`` with its weights on a grid; the first FFN's pre-activations are exact.

    So a pre-activation never falls into another bin of a histogram because of its batch.
    """
    model = own_model(*gated)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(on_a_grid(parameter))
    return model


def assert_same_plan(plan: nbl.Plan, other: nbl.Plan, tolerance: float) -> None:
    """Compare all but the configuration; floating tensors relative to their largest entry."""
    assert plan.fingerprint == other.fingerprint
    for site, wanted in zip(plan.sites, other.sites, strict=True):
        for fact in ("name", "kind", "decision", "reason"):
            assert getattr(site, fact) == getattr(wanted, fact), site.name
        assert site.details.keys() == wanted.details.keys()
        for fact, expected in wanted.details.items():
            close = pytest.approx(expected, rel=tolerance) if type(expected) is float else expected
            assert site.details[fact] == close, (site.name, fact)
        for error in ("nmse", "holdout_nmse"):
            found, expected = getattr(site, error), getattr(wanted, error)
            assert found == pytest.approx(expected, rel=tolerance, nan_ok=True), site.name
        assert site.tensors.keys() == wanted.tensors.keys()
        for key, tensor in site.tensors.items():
            expected = wanted.tensors[key]
            scale = float(expected.abs().max()) if expected.is_floating_point() else 0.0
            torch.testing.assert_close(tensor, expected, rtol=0, atol=tolerance * scale)


def dense_inputs(model: OwnModel, x: Tensor) -> list[Tensor]:
    """What every FFN of the dense model reads, [tokens, d] float64 each."""
    read, x = [], x.reshape(-1, x.shape[-1]).double()
    with torch.no_grad():
        for layer in copy.deepcopy(model).double().layers:
            read.append(x)
            x = x + layer(x)
    return read


def split_rows(batches: Iterable[Tensor], config: nbl.Config, name: str) -> list[list[Tensor]]:
    """Return the indices of each batch's training and held-out tokens.

    Args:
        batches: The model's main input.
        config: Of the calibration.
        name: The argument that takes the batches.
    """
    chooser = RowChooser(config.holdout, config.seed)
    chosen = []
    for batch in batches:
        chooser.start_batch({name: batch})
        chosen.append(list(chooser.split("", batch if batch.ndim == 3 else batch[..., None])))
    return chosen


def nmse(made: Tensor, wanted: Tensor) -> float:
    """E‖ŷ − y‖² / E‖y − E y‖² of [tokens, d_out]."""
    made, wanted = made.double(), wanted.double()
    total = (wanted - wanted.mean(0)).square().sum()
    return float((made - wanted).square().sum() / total)
