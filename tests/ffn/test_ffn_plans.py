"""Plans with FFNs: together with attention, through their files, and for whose weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch._dynamo
from helpers.ffn_calibrating import (
    FORMS,
    assert_same_plan,
)
from helpers.own_ffn import (
    NEURONS,
    OwnModel,
    compiled_ffn,
    folded,
    own_model,
    rows,
)
from helpers.tiny import compiled, output, text, texts, tiny
from torch import Tensor, nn

import nbl_compiler as nbl
from nbl_compiler.errors import (
    PlanMismatchError,
    WeightsReleasedError,
)

# Together with attention.

ATTENTION, FFNS = nbl.Attention(count=1), nbl.FFN(count=1, keep=0.25, rank_by="nmse")


@cache
def both() -> tuple[nn.Module, nbl.Plan]:
    model = tiny()
    config = nbl.Config(attention=ATTENTION, ffn=FFNS)
    plan = nbl.calibrate(model, texts(), config, progress=False)
    nbl.attach(model, None)
    return model, plan


def test_one_calibration_for_both_kinds_is_the_two_apart() -> None:
    model, plan = both()
    apart = [
        nbl.calibrate(model, texts(), nbl.Config(attention=a, ffn=f), progress=False)
        for a, f in ((ATTENTION, None), (None, FFNS))
    ]
    nbl.attach(model, None)
    sites = [*apart[0].sites, *apart[1].sites]
    assert [site.kind for site in plan.sites] == ["attention"] * 2 + ["ffn"] * 2
    joined = replace(plan, sites=tuple(sites))
    assert joined.digest == plan.digest


def test_a_plan_of_both_kinds_survives_its_file(tmp_path: Path) -> None:
    model, plan = both()
    plan.save(tmp_path / "plan.safetensors")
    loaded = nbl.Plan.load(tmp_path / "plan.safetensors")
    assert loaded.digest == plan.digest
    for key, tensor in plan.tensors().items():
        assert loaded.tensors()[key].dtype == tensor.dtype
        assert torch.equal(loaded.tensors()[key], tensor)
    first = output(compiled(model, plan=plan), text(), use_cache=False)
    assert torch.equal(output(compiled(model, plan=loaded), text(), use_cache=False), first)
    assert not torch.equal(output(model, text(), use_cache=False), first)


def test_a_batch_that_ranks_by_loss_is_not_fitted_to() -> None:
    """The last batch is set aside in every pass, also if the batches come from an iterator."""
    model, options = tiny(layers=1), nbl.FFN(max_nmse=1e9, keep=0.25)
    config = nbl.Config(attention=nbl.Attention(rank_by="loss", count=1), ffn=options)
    plan = nbl.calibrate(model, iter(texts()), config, progress=False)
    alone = nbl.calibrate(
        model, texts()[:-1], nbl.Config(attention=None, ffn=options), progress=False
    )
    assert_same_plan(
        replace(plan, sites=tuple(s for s in plan.sites if s.kind == "ffn")), alone, 0.0
    )


# Whose plan it is.


@cache
def owned() -> tuple[OwnModel, nbl.Plan]:
    model = own_model(False, False)
    plan = folded(model, layers=(1,), **FORMS["exact"])
    nbl.attach(model, None)
    return model, plan


def scale_down(model: OwnModel) -> None:
    model.layers[1].down.weight.mul_(1.01)


def shift_bias(model: OwnModel) -> None:
    model.layers[1].up.bias.add_(0.01)


def change_before(model: OwnModel) -> None:
    model.layers[0].up.weight.mul_(1.01)


def permute_neurons(model: OwnModel) -> None:
    """The same function, but the plan's neurons would be others."""
    ffn = model.layers[1]
    for tensor, dim in ((ffn.up.weight, 0), (ffn.up.bias, 0), (ffn.down.weight, 1)):
        tensor.copy_(tensor.flip(dim))


def run(model: nn.Module, plan: nbl.Plan) -> None:
    with torch.no_grad():
        compiled_ffn(model, plan)(rows(1, 3))


@pytest.mark.parametrize("change", [scale_down, shift_bias, change_before, permute_neurons])
def test_other_weights(change: Callable[[OwnModel], None]) -> None:
    model, plan = owned()
    other = copy.deepcopy(model)
    with torch.no_grad():
        change(other)
    message = "is not one that the plan was calibrated on; calibrate this model"
    with pytest.raises(PlanMismatchError, match=message):
        nbl.attach(other, plan)
    with pytest.raises(PlanMismatchError, match=message):
        run(other, plan)


def test_the_same_weights_in_other_places() -> None:
    model, plan = owned()
    other = copy.deepcopy(model)
    other.layers = nn.ModuleList(reversed(other.layers))
    with pytest.raises(PlanMismatchError, match=r"does not fit layers\.1"):
        run(other, plan)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: own_model(False, False, activation="silu"), "activation 'gelu', the model has"),
        (lambda: own_model(False, False, seed=1), "does not fit"),
        (lambda: own_model(False, True), "gated False, the model has True"),
    ],
)
def test_another_model(other: Callable[[], OwnModel], message: str) -> None:
    """The first has the very same weights, names and shapes, and another activation."""
    with pytest.raises(PlanMismatchError, match=message):
        run(other(), owned()[1])


def edited(plan: nbl.Plan, key: str, tensor: Tensor | None) -> nbl.Plan:
    site = plan.sites[1]
    tensors = {name: t for name, t in site.tensors.items() if name != key}
    if tensor is not None:
        tensors[key] = tensor
    return replace(plan, sites=(plan.sites[0], replace(site, tensors=tensors)))


@pytest.mark.parametrize("how", ["missing", "short"])
@pytest.mark.parametrize("key", ["weight", "bias", "kept", "up_slope", "intercept", "low", "high"])
def test_tensors_of_the_wrong_shape(key: str, how: str) -> None:
    model, plan = owned()
    tensor = plan.sites[1].tensors[key]
    wrong = None if how == "missing" else tensor[1:]
    shape = "None" if wrong is None else str(tuple(wrong.shape))
    message = rf"the plan's {key} for layers\.1 has shape "
    with pytest.raises(PlanMismatchError, match=message) as raised:
        run(model, edited(plan, key, wrong))
    assert f"has shape {shape}, the model needs {tuple(tensor.shape)}" in str(raised.value)


@pytest.mark.parametrize("key", ["neurons", "gated", "activation"])
def test_facts_of_another_ffn(key: str) -> None:
    model, plan = owned()
    site = plan.sites[1]
    other = {"neurons": NEURONS + 1, "gated": True, "activation": "relu"}[key]
    wrong = replace(site, details={**site.details, key: other})
    with pytest.raises(PlanMismatchError, match=f"the plan folds layers.1 with {key} {other!r}"):
        run(model, replace(plan, sites=(plan.sites[0], wrong)))


def test_weights_that_were_released_for_another_plan() -> None:
    model = own_model(False)
    plan = folded(model, **FORMS["exact, 8 bits"])
    nbl.release(model, plan, rows(1, 3))
    run(model, plan)
    with pytest.raises(WeightsReleasedError, match=r"folding layers\.0 by this plan needs 4"):
        run(model, replace(plan))
    with pytest.raises(WeightsReleasedError, match="calibration needs 4 weight"):
        folded(model)
