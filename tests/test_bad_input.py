"""Plans that do not belong to the model, and models that the backend cannot serve."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.bad_selections import BAD_SELECTIONS
from helpers.plans import random_plan
from helpers.tiny import calibrated, compiled, output, text, tiny
from models.architectures import HIDDEN
from torch import nn

import nbl_compiler as nbl
from nbl_compiler import errors
from nbl_compiler.errors import ConfigError, PlanMismatchError, UnsupportedDtypeError

LAYERS = 3


@pytest.fixture(scope="module")
def subject() -> tuple[nn.Module, nbl.Plan]:
    """A model and a plan that rewrites its second layer."""
    model = tiny(layers=LAYERS)
    return model, calibrated(model, layers=(1,))


def weight_of(model: nn.Module) -> torch.Tensor:
    return model.model.layers[1].self_attn.q_proj.weight


def perturb(model: nn.Module) -> None:
    weight = weight_of(model)
    weight.mul_(1 + 1e-2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))


def perturb_before(model: nn.Module) -> None:
    model.model.layers[0].mlp.up_proj.weight.mul_(1.01)


def permute_rows(model: nn.Module) -> None:
    weight = weight_of(model)
    weight.copy_(weight.flip(0))


def permute_columns(model: nn.Module) -> None:
    weight = weight_of(model)
    weight.copy_(weight.roll(1, 1))


def swap_layers(model: nn.Module) -> None:
    layers = model.model.layers
    layers[1], layers[2] = layers[2], layers[1]


def prune_first_layer(model: nn.Module) -> None:
    del model.model.layers[0]
    model.config.num_hidden_layers = LAYERS - 1
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index


def changed(model: nn.Module, change: Callable[[nn.Module], None]) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        change(other)
    return other


@pytest.mark.parametrize("change", [perturb, perturb_before, permute_rows, permute_columns])
def test_other_weights(
    subject: tuple[nn.Module, nbl.Plan], change: Callable[[nn.Module], None]
) -> None:
    model, plan = subject
    other = changed(model, change)
    message = "is not one that the plan was calibrated on; calibrate this model"
    with pytest.raises(PlanMismatchError, match=message):
        nbl.attach(other, plan)
    with pytest.raises(PlanMismatchError, match=message):
        output(compiled(other, plan=plan), text())


@pytest.mark.parametrize("change", [swap_layers, prune_first_layer])
def test_the_same_weights_in_other_places(
    subject: tuple[nn.Module, nbl.Plan], change: Callable[[nn.Module], None]
) -> None:
    """Every weight is known to the plan, but the site's are another layer's."""
    model, plan = subject
    other = changed(model, change)
    with pytest.raises(PlanMismatchError, match=r"does not fit model\.layers\.1\.self_attn"):
        output(compiled(other, plan=plan), text())


def test_a_changed_head_changes_no_map(subject: tuple[nn.Module, nbl.Plan]) -> None:
    model, plan = subject
    other = changed(model, lambda m: m.lm_head.weight.mul_(2))
    expected = 2 * output(compiled(model, plan=plan), text())
    torch.testing.assert_close(output(compiled(other, plan=plan), text()), expected)


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_another_model(subject: tuple[nn.Module, nbl.Plan], name: str) -> None:
    _, plan = subject
    other = tiny(name, layers=LAYERS)
    with pytest.raises(PlanMismatchError, match=r"plan for LlamaForCausalLM \(0\.0 M parameters\)"):
        nbl.attach(other, plan)
    if name == "qwen2":  # whose sites have the same names
        with pytest.raises(PlanMismatchError, match="does not fit this model"):
            output(compiled(other, plan=plan), text())


def test_no_file_is_left_half_written_by_a_refusal(
    subject: tuple[nn.Module, nbl.Plan], tmp_path: Path
) -> None:
    model, plan = subject
    path = tmp_path / "plan.safetensors"
    plan.save(path)
    with pytest.raises(PlanMismatchError):
        output(compiled(changed(model, perturb), plan=path), text())
    assert nbl.Plan.load(path).digest == plan.digest


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"weight": (32, 31), "bias": (32,)},
            r"weight .* has shape \(32, 31\), .* needs \(32, 32\)",
        ),
        (
            {"weight": (32, 32), "bias": (31,)},
            r"bias .* has shape \(31,\), the model needs \(32,\)",
        ),
        ({"weight": (32, 32)}, r"bias for model\.layers\.0\.self_attn has shape None"),
        ({}, "has shape None"),
    ],
)
def test_maps_of_the_wrong_shape(tensors: dict[str, tuple[int, ...]], message: str) -> None:
    model = tiny(layers=1)
    good = random_plan(model, ["model.layers.0.self_attn"], [0], HIDDEN)
    wrong = replace(good.sites[0], tensors={k: torch.zeros(s) for k, s in tensors.items()})
    with pytest.raises(PlanMismatchError, match=message):
        output(compiled(model, plan=replace(good, sites=(wrong,))), text())


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_a_model_cast_to_a_dtype_without_linear_maps(
    subject: tuple[nn.Module, nbl.Plan], dtype: torch.dtype
) -> None:
    model, plan = subject
    other = copy.deepcopy(model).to(dtype)
    with pytest.raises(UnsupportedDtypeError, match=str(dtype)):
        output(compiled(other, plan=plan), text())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *BAD_SELECTIONS,
        ({"rank_by": "cos"}, "rank_by='cos' must be 'nmse', 'loss' or 'cca'"),
        ({"input": "raw"}, "input='raw' must be 'normed' or 'residual'"),
        ({"taps": -1}, "taps=-1 must be an integer of at least 0"),
        ({"taps": True}, "taps=True must be an integer"),
        ({"taps": 1.0}, r"taps=1\.0 must be an integer"),
        ({"averages": 1}, "averages=1 must be True or False"),
        ({"mixed": 1}, "mixed=1 must be True or False"),
        ({"mixed": True, "taps": 1}, "give `mixed` or `taps`, not both"),
    ],
)
def test_attention_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        nbl.Attention(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ridge": -1.0}, r"ridge=-1\.0 must be 'auto' or at least 0"),
        ({"ridge": "small"}, "ridge='small' must be"),
        ({"ridge": float("nan")}, "ridge=nan must be"),
        ({"ridge": float("inf")}, "ridge=inf must be"),
        ({"ridge": True}, "ridge=True must be"),
        ({"holdout": 0.6}, r"holdout=0\.6 must lie in \[0, 0\.5\]"),
        ({"holdout": -0.1}, r"holdout=-0\.1 must lie in"),
        ({"holdout": float("nan")}, "holdout=nan must lie in"),
        ({"holdout": "some"}, "holdout='some' must lie in"),
        ({"attention": 3}, "attention=3 must be nbl.Attention"),
        ({"seed": "x"}, "seed='x' must be an integer"),
    ],
)
def test_configuration_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        nbl.Config(**options)


def test_every_error_is_the_packages_and_a_builtin_one() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert len(kinds) > 5
    for kind in kinds:
        assert kind.__doc__
        if kind is errors.NBLWarning:
            assert issubclass(kind, UserWarning)
            continue
        assert issubclass(kind, errors.NBLError)
        if kind is not errors.NBLError:
            assert issubclass(kind, ValueError | TypeError | RuntimeError)
