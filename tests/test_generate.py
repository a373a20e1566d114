"""``generate`` of transformers, however the model was compiled and whatever cache it uses.

The oracle is the same plan applied by surgery, generating without a compiler.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
import torch._dynamo
from helpers.generating import generate, prompt
from helpers.recording import rewritten, rewritten_graphs
from helpers.scenarios import Subject, subject
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import CompileConfig, StaticCache

import nbl_compiler as nbl
from nbl_compiler.errors import CacheMismatchError

STEPS = 20  # two and a half sliding windows
LENGTH = 40  # of static caches
# As in test_oracle: a few hundred float32 steps, relative to the deviation of the logits.
ROUNDING = 1e-4

Compile = Callable[[nn.Module, dict[str, Any]], Any]


def compiled_forward(model: nn.Module, options: dict[str, Any]) -> Any:
    model.forward = torch.compile(model.forward, backend="nbl", options=options)  # type: ignore[method-assign]
    return model


def compiled_in_place(model: nn.Module, options: dict[str, Any]) -> Any:
    model.compile(backend="nbl", options=options)
    return model


def compiled_module(model: nn.Module, options: dict[str, Any]) -> Any:
    return torch.compile(model, backend="nbl", options=options)


def compiled_decode(model: nn.Module, options: dict[str, Any]) -> Any:
    """Ask transformers to compile, which it does for decoding only."""
    config = CompileConfig(backend="nbl", mode=None, options=options)
    config._compile_all_devices = True  # also on a CPU
    model.generation_config.compile_config = config
    return model


def own_copy(one: Subject) -> tuple[nn.Module, dict[str, Any]]:
    """Return a copy of the subject's model, and the options to compile it with."""
    return copy.deepcopy(one.model), {"plan": one.plan, "lowering": "eager"}


CACHES = ("default", "static", "nbl static", "nbl dynamic")
thorough = pytest.mark.thorough


def cache_arguments(one: Subject, kind: str) -> dict[str, Any]:
    """Return how one of the ``CACHES`` is asked for."""
    if kind.startswith("nbl"):
        how = kind.split()[1]
        return {"past_key_values": nbl.cache(one.model, one.plan, LENGTH, implementation=how)}
    return {} if kind == "default" else {"cache_implementation": kind}


Generated = tuple[Tensor, Tensor]


def run(model: Any, name: str, steps: int = STEPS, **more: Any) -> Generated:
    """Return token ids [B, T + steps] and the logits that chose them [B, steps, V]."""
    made = generate(model, prompt(name, padded=True), steps - 1, **more)
    return made.sequences, torch.stack(made.logits, dim=1)


@cache
def expected(name: str, steps: int = STEPS) -> Generated:
    """Return what the oracle generates."""
    return run(subject(name, "sdpa").oracle, name, steps)


@cache
def dense(name: str) -> Generated:
    """Return what the model generates without the plan."""
    return run(subject(name, "sdpa").model, name)


def assert_same(made: Generated, wanted: Generated) -> None:
    assert torch.equal(made[0], wanted[0])
    atol = ROUNDING * wanted[1].double().std().item()
    torch.testing.assert_close(made[1], wanted[1], rtol=0, atol=atol)


def assert_linearized(made: Generated, name: str) -> None:
    assert_same(made, expected(name))
    assert (made[1] - dense(name)[1]).abs().max() > 1  # the plan's maps do matter


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(pytest.param("llama", kind, marks=thorough) for kind in CACHES),
        *(("gemma3", kind) for kind in CACHES if kind != "static"),
        pytest.param("gemma3", "static", marks=thorough),
    ],
)
def test_a_compiled_forward(name: str, kind: str) -> None:
    one = subject(name, "sdpa")
    assert_linearized(
        run(compiled_forward(*own_copy(one)), name, **cache_arguments(one, kind)), name
    )


@pytest.mark.parametrize(
    ("name", "kind", "how"),
    [
        ("llama", "default", compiled_in_place),
        ("gemma3", "nbl static", compiled_module),
        pytest.param("llama", "default", compiled_module, marks=thorough),
        pytest.param("gemma3", "nbl static", compiled_in_place, marks=thorough),
    ],
)
def test_a_compiled_model(name: str, kind: str, how: Compile) -> None:
    one = subject(name, "sdpa")
    assert_linearized(run(how(*own_copy(one)), name, **cache_arguments(one, kind)), name)


@pytest.mark.parametrize(
    ("more", "kind"),
    [
        ({"num_beams": 2}, "nbl dynamic"),
        ({"prefill_chunk_size": 4}, "default"),
        pytest.param({"num_beams": 2}, "default", marks=thorough),
        pytest.param({"prefill_chunk_size": 4}, "nbl dynamic", marks=thorough),
    ],
    ids=str,
)
def test_other_ways_to_generate(more: dict[str, Any], kind: str) -> None:
    """Beams reorder the cache; a prompt in chunks meets a cache that is partly filled."""
    one = subject("gemma3", "sdpa")
    wanted = run(one.oracle, "gemma3", **more)
    model = compiled_in_place(*own_copy(one))
    assert_same(run(model, "gemma3", **more, **cache_arguments(one, kind)), wanted)


def test_a_compiled_model_that_generates_with_the_attached_plan() -> None:
    one = subject("llama", "sdpa")
    model, options = own_copy(one)
    nbl.attach(model, options.pop("plan"))
    assert_linearized(run(compiled_module(model, options), "llama"), "llama")


# What torch.compile returns hands ``generate`` on to the model itself.


def test_the_model_itself_stays_dense_beside_its_compiled_module() -> None:
    model, options = own_copy(subject("llama", "sdpa"))
    fast = compiled_module(model, options)
    run(fast, "llama")
    assert_same(run(model, "llama"), dense("llama"))
    with pytest.raises(ValueError, match="not_an_argument"):
        fast.generate(not_an_argument=1)
    assert_same(run(model, "llama"), dense("llama"))


def test_generating_again_compiles_nothing() -> None:
    fast = compiled_module(*own_copy(subject("llama", "sdpa")))
    first = run(fast, "llama")
    with rewritten_graphs() as graphs:
        assert_same(run(fast, "llama"), first)
    assert not graphs


def test_modules_of_other_backends_are_left_as_torch_made_them() -> None:
    model, _ = own_copy(subject("llama", "sdpa"))
    assert torch.compile(model, backend="eager").generate == model.generate
    with pytest.raises(AttributeError, match="generate"):
        _ = torch.compile(nn.Linear(2, 2), backend="nbl").generate


# transformers' own compilation.


def test_a_compile_config_reaches_decoding_only() -> None:
    """The prompt is read by the dense model, and every later token by the linearized one."""
    one = subject("llama", "sdpa")
    with rewritten_graphs() as graphs:
        made = run(compiled_decode(*own_copy(one)), "llama", cache_implementation="static")
    assert [rewritten(graph) for graph in graphs] == [list(one.linearized)]

    past = StaticCache(config=one.model.config, max_cache_len=LENGTH)
    ids, mask = prompt("llama", padded=True).values()
    model: nn.Module = one.model
    for step in range(STEPS):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with torch.no_grad():
            logits = model(ids, attention_mask=mask, position_ids=positions, past_key_values=past)
        atol = ROUNDING * made[1].std().item()
        torch.testing.assert_close(logits.logits[:, -1], made[1][:, step], rtol=0, atol=atol)
        ids, model = made[0][:, step - STEPS, None], one.oracle
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)


@pytest.mark.parametrize(
    ("how", "backend"),
    [
        (compiled_forward, "nbl"),
        (compiled_in_place, "eager"),
        pytest.param(compiled_forward, "eager", marks=thorough),
        pytest.param(compiled_in_place, "nbl", marks=thorough),
    ],
)
def test_transformers_compiling_on_top_loses_no_site(how: Compile, backend: str) -> None:
    """As ``generate`` does on a GPU with a static cache, unasked."""
    one = subject("llama", "sdpa")
    model = how(*own_copy(one))
    options = {"plan": one.plan, "lowering": "eager"} if backend == "nbl" else None
    config = CompileConfig(backend=backend, mode=None, options=options)
    config._compile_all_devices = True
    model.generation_config.compile_config = config
    assert_linearized(run(model, "llama", **cache_arguments(one, "nbl static")), "llama")


# How often Dynamo compiles.


@pytest.mark.parametrize(
    ("kind", "count"),
    [("default", 4), pytest.param("static", 3, marks=thorough), ("nbl static", 3)],
)
def test_a_sliding_window_is_compiled_for_a_few_states_only(kind: str, count: int) -> None:
    """The prompt, a window that fills, a full one; a growing cache has one more: two lengths."""
    one = subject("gemma3", "sdpa")
    model, options = own_copy(one)
    with rewritten_graphs() as graphs:
        run(compiled_in_place(model, options), "gemma3", 30, **cache_arguments(one, kind))
    assert len(graphs) == count


@pytest.mark.parametrize("kind", [pytest.param("default", marks=thorough), "static"])
def test_no_more_graphs_than_the_dense_model(kind: str) -> None:
    one = subject("gemma3", "sdpa")
    model, options = own_copy(one)
    with rewritten_graphs() as graphs:
        run(compiled_in_place(model, options), "gemma3", **cache_arguments(one, kind))
    plain: list[GraphModule] = []

    def backend(graph_module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        plain.append(graph_module)
        return graph_module.forward

    torch._dynamo.reset()
    model.compile(backend=backend)
    run(model, "gemma3", **cache_arguments(one, kind))
    assert len(graphs) == len(plain)


@torch._dynamo.config.patch(recompile_limit=2)
def test_beyond_dynamos_limit_the_plans_own_cache_refuses_to_run_dense() -> None:
    """A window's length is a Python number: with ``dynamic=False`` every token compiles anew."""
    one = subject("gemma3", "sdpa")
    model, options = own_copy(one)
    model.compile(backend="nbl", options=options, dynamic=False)
    with pytest.raises(CacheMismatchError, match="this layer runs dense"):
        run(model, "gemma3", **cache_arguments(one, "nbl static"))
