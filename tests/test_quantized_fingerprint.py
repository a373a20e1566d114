"""Which quantized weights a plan takes for its own."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from helpers.plans import random_plan
from helpers.quantizing import quantized
from helpers.tiny import compiled, output, text, tiny
from models.architectures import BY_NAME, HIDDEN
from torch import Tensor, nn
from torchao.quantization import Int8Tensor, PerRow

import nbl_compiler as nbl
from nbl_compiler import plan_file
from nbl_compiler.errors import PlanMismatchError
from nbl_compiler.fingerprint import sketch

ROWS, WIDTH = 96, 128


def weight(dtype: torch.dtype = torch.float32) -> Tensor:
    made = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(5)) / WIDTH**0.5
    return made.to(dtype)


def int8(given: Tensor) -> Tensor:
    return Int8Tensor.from_hp(given, granularity=PerRow())


def merged(given: Tensor, size: float = 1e-3) -> Tensor:
    """Return the weight with an adapter of rank 2 merged into it, ``size`` of its norm."""
    generator = torch.Generator().manual_seed(6)
    change = torch.randn(ROWS, 2, generator=generator) @ torch.randn(2, WIDTH, generator=generator)
    return given + change * (size * given.norm() / change.norm())


def tuned(given: Tensor) -> Tensor:
    return given + 1e-4 * torch.randn(given.shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_weight_itself_is_recognised(dtype: torch.dtype) -> None:
    own = weight(dtype)
    assert sketch(int8(own)).matches(sketch(own))
    assert sketch(own).matches(sketch(int8(own)))
    assert sketch(int8(own)).matches(sketch(weight()))  # calibrated before it was cast
    assert sketch(int8(own)).matches(sketch(int8(own)))


@pytest.mark.parametrize(
    "other",
    [
        merged,
        tuned,
        lambda w: w * 1.001,
        lambda w: w.flip(0),
        lambda w: w.flip(1),  # every row's greatest entry stays
        lambda w: w[torch.randperm(ROWS, generator=torch.Generator().manual_seed(8))],
        lambda w: w.abs(),
        lambda w: int8(w).dequantize(),  # quantized twice
    ],
)
def test_others_are_not(other: object) -> None:
    own = weight()
    assert not sketch(int8(other(own))).matches(sketch(own))  # type: ignore[operator]


def test_what_the_peaks_are_for() -> None:
    """By norm and sketch alone, within the rounding error, an adapter goes unnoticed."""
    known = replace(sketch(weight()), peaks=None)
    other = sketch(int8(merged(weight())))
    blind = replace(other, peaks=known.peaks)
    assert abs(blind.norm - known.norm) < other.step
    assert abs(blind.value - known.value) < 4 * other.step


def plan_for(model: nn.Module) -> nbl.Plan:
    return random_plan(model, BY_NAME["llama"].site_names(1), [0], HIDDEN)


def test_attaching_to_a_quantized_model() -> None:
    model = tiny(layers=1)
    plan = plan_for(model)
    other = quantized(model)
    nbl.attach(other, plan)
    direct = output(compiled(quantized(model), plan=plan), text())
    assert torch.equal(output(compiled(other), text()), direct)


def test_a_plan_from_its_file() -> None:
    model = tiny(layers=1)
    plan = plan_file.from_bytes(plan_file.to_bytes(plan_for(model)))
    result = output(compiled(quantized(model), plan=plan), text())
    assert torch.equal(result, output(compiled(quantized(model), plan=plan_for(model)), text()))


def test_another_model_is_refused() -> None:
    plan = plan_for(tiny(layers=1))
    other = quantized(tiny(seed=1, layers=1))
    with pytest.raises(PlanMismatchError, match="not one that the plan was calibrated on"):
        nbl.attach(other, plan)


@pytest.mark.filterwarnings("ignore:backend=:nbl_compiler.errors.NBLWarning")
def test_two_quantized_models_do_not_share_compiled_code() -> None:
    models = [quantized(tiny(seed=seed, layers=1)) for seed in (0, 1)]
    plan = plan_for(tiny(layers=1))
    expected = [output(compiled(models[0], plan=plan), text()), output(models[1], text())]
    nbl.attach(models[0], plan)
    fast = [compiled(model) for model in models]
    for turn in (0, 1, 0, 1):
        assert torch.equal(output(fast[turn], text()), expected[turn])


def test_a_merged_adapter_is_refused() -> None:
    """Nothing but one quantized matrix of the site differs, by a thousandth."""
    model = tiny(layers=1)
    plan = plan_for(model)
    other = copy.deepcopy(model)
    projection = other.model.layers[0].self_attn.v_proj.weight
    generator = torch.Generator().manual_seed(9)
    noise = torch.randn(projection.shape, generator=generator)
    with torch.no_grad():
        projection.add_(noise * (1e-3 * projection.norm() / noise.norm()))
    with pytest.raises(PlanMismatchError, match="v_proj_parameters_weight_ of shape"):
        output(compiled(quantized(other), plan=plan), text())


def test_a_changed_code_is_noticed() -> None:
    """The sketch is remembered; writing into the codes makes it anew."""
    held = nn.Parameter(int8(weight()), requires_grad=False)
    before = sketch(held)
    held.qdata[3] = 0
    assert sketch(held) != before


def test_a_plan_of_an_older_release() -> None:
    model = tiny(layers=1)
    plan = plan_for(model)
    old = replace(plan, fingerprint=tuple(replace(s, peaks=None) for s in plan.fingerprint))
    old = plan_file.from_bytes(plan_file.to_bytes(old))
    output(compiled(model, plan=old), text())
    with pytest.raises(PlanMismatchError, match=r"of an older release.*before it is quantized"):
        output(compiled(quantized(model), plan=old), text())
