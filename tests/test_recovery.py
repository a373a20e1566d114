"""What calibration must give back exactly, or to rounding, for every model and every stream.

See ``test_calibration`` for attention over one position, ``test_plan_file`` for generated plans,
``solvers/`` for the mathematics alone.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch._dynamo
from helpers.tiny import calibrated, compiled, config, output, text, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from models.architectures import BY_NAME, VOCABULARY, inputs
from torch import Tensor, nn

import nbl_compiler as nbl
from nbl_compiler.calibration import observe_model
from nbl_compiler.errors import NBLWarning
from nbl_compiler.observe import Observation, Observer
from nbl_compiler.plans import Plan, Site

# Float32 rounding of a whole tiny model, relative to its largest output.
LOGIT_TOLERANCE = 3e-5
# A block of rows in one matrix product instead of another: float32 rounding, relative to the
# largest entry.
MOMENT_TOLERANCE = 1e-5

# Families whose values do not depend on the position: rotary positions turn queries and keys only.
WITHOUT_POSITIONS = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi", "phi3", "gpt_neox", "gptj",
    "falcon", "bloom", "starcoder2", "smollm3", "olmo2", "cohere",
)  # fmt: skip
seeds = st.integers(0, 1000)
thorough = pytest.mark.thorough


@settings(max_examples=6)
@given(
    st.sampled_from(WITHOUT_POSITIONS), seeds, st.integers(2, 10), st.sampled_from([0.0, "auto"])
)
def test_attention_over_equal_values_is_recovered(
    name: str, seed: int, length: int, ridge: float | str
) -> None:
    """Each row repeats one token: whatever the weights of attention, it returns Wo Wv x."""
    torch._dynamo.reset()
    model = tiny(name, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    vocabulary = torch.arange(5, VOCABULARY)
    rows = vocabulary[torch.randperm(len(vocabulary), generator=generator)][:, None]
    rows = rows.expand(-1, length)
    plan = nbl.calibrate(
        model, [rows], config(layers=(0, 1), ridge=ridge, holdout=0.2), progress=False
    )
    dense = output(model, rows)
    error = (output(compiled(model), rows) - dense).abs().max() / dense.abs().max()
    assert error < LOGIT_TOLERANCE
    assert [site.name for site in plan.rewritten] == BY_NAME[name].site_names(2)
    assert all(site.nmse < 1e-6 for site in plan.rewritten)


def moments(model: nn.Module, batches: Iterable[Tensor]) -> Observation:
    options = config(holdout=0.3)
    return observe_model(model, batches, options, progress=False, solve=False).observation


@settings(max_examples=4)
@given(st.sampled_from(["llama", "gpt2", "bert"]), st.data())
def test_moments_do_not_depend_on_the_cuts(name: str, data: st.DataObject) -> None:
    rows = text(12, 70, seed=data.draw(seeds))  # 70: a held-out block and a piece of one
    cuts = sorted(data.draw(st.sets(st.integers(1, 11), min_size=1, max_size=4)))
    parts = torch.tensor_split(rows, cuts)
    model = tiny(name, layers=1)
    whole, cut = moments(model, [rows]), moments(model, parts)
    assert whole.sites.keys() == cut.sites.keys()
    for key, site in whole.sites.items():
        for one, other in (
            (site.train, cut.sites[key].train),
            (site.holdout, cut.sites[key].holdout),
        ):
            assert one.count == other.count
            one = one.about(other.shift_x, other.shift_y, other.shift_t)
            for part in ("sum_x", "sum_y", "xx", "yx", "tx", "tt", "yy"):
                a, b = getattr(one, part), getattr(other, part)
                scale = float(b.abs().max()) if b.numel() else 1.0
                torch.testing.assert_close(a, b, rtol=0, atol=MOMENT_TOLERANCE * max(scale, 1.0))


@settings(max_examples=2)
@given(st.sampled_from(["llama", "gemma3", "gpt2", "bert"]), seeds)
def test_a_plan_from_its_file_is_the_plan(tmp_path: Path, name: str, seed: int) -> None:
    """Tensors, decisions and what the compiled model says: the same to the bit."""
    torch._dynamo.reset()
    model = tiny(name, seed=seed)
    plan = calibrated(model, count=1)
    plan.save(tmp_path / "plan.safetensors")
    loaded = Plan.load(tmp_path / "plan.safetensors")
    assert loaded.digest == plan.digest
    for key, tensor in plan.tensors().items():
        assert torch.equal(loaded.tensors()[key], tensor)
    first = output(compiled(model, plan=plan), text())
    assert torch.equal(output(compiled(model, plan=loaded), text()), first)
    by_path = compiled(model, plan=tmp_path / "plan.safetensors")
    assert torch.equal(output(by_path, text()), first)
    assert not torch.equal(output(model, text()), first)


def all_kept(name: str) -> Plan:
    sites = BY_NAME[name].site_names(2)
    return Plan(tuple(Site(site, "attention", "kept", "for the test") for site in sites))


@pytest.mark.parametrize("lowering", [pytest.param("eager", marks=thorough), "aot_eager"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "bert", pytest.param("t5", marks=thorough)])
def test_plans_that_replace_nothing(name: str, lowering: str) -> None:
    model, example = tiny(name), inputs(name)
    dense = output(model, **example)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NBLWarning)
        for plan in (Plan(), all_kept(name)):
            fast = compiled(model, plan=plan, lowering=lowering, strict=True)
            assert torch.equal(output(fast, **example), dense)


# Memory.


def holdings(root: object) -> tuple[int, int]:
    """Return (bytes of all tensors, number of containers) that can be reached from an object."""
    stack, seen = [root], {id(root): root}
    storages: dict[int, int] = {}
    while stack:
        item = stack.pop()
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            continue
        for held in gc.get_referents(item):
            code = isinstance(held, type | ModuleType | FunctionType | MethodType)
            if not code and id(held) not in seen and gc.is_tracked(held):
                seen[id(held)] = held
                stack.append(held)
    return sum(storages.values()), len(seen)


@pytest.mark.parametrize("name", ["llama", pytest.param("t5", marks=thorough)])
def test_an_observer_holds_the_same_after_any_number_of_tokens(name: str) -> None:
    """Everything it holds, the last batch and the rows that wait for a full block included."""
    model = tiny(name, layers=1)
    held: list[tuple[int, int]] = []
    finish = Observer.finish

    def weigh_and_finish(self: Observer) -> Any:
        held.append(holdings(self))
        return finish(self)

    with patch.object(Observer, "finish", weigh_and_finish):
        for tokens in (5_000, 50_000):
            found = moments(model, (text(4, 125, seed=i) for i in range(tokens // 500)))
            assert all(s.train.count + s.holdout.count == tokens for s in found.sites.values())
    assert held[0] == held[1]
    kept = sum(s.train.nbytes + s.holdout.nbytes for s in found.sites.values())
    assert held[0][0] > kept > 0  # the moments are among what was weighed
