"""Tiny models run through ``backend="nbl"``, each way once, for several tests to look at.

Tracing is most of a test's time here, so every run is made once a session and kept: the graphs
that the backend rewrote, the logits, and what the oracle says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch._dynamo
from helpers.generating import CACHE_LENGTH, STEPS, generate, logits_of, prompt
from helpers.plans import random_plan
from helpers.recording import rewritten_graphs
from helpers.surgery import linearize_by_surgery
from models.architectures import ARCHITECTURES, BY_NAME, HIDDEN, inputs, make
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import Cache, DynamicCache, EncoderDecoderCache, StaticCache

import nbl_compiler as nbl
from nbl_compiler.passes.match_attention import match
from nbl_compiler.passes.query_heads import query_heads
from nbl_compiler.plans import Plan
from nbl_compiler.value_states import NO_STATES, States

LAYERS = 2  # one linearized, one that attends to a cache
CACHES = ("DynamicCache", "StaticCache", "nbl static", "nbl dynamic")
# One family of each kind of keys and values: grouped heads, sliding windows, both kinds of layers
# in turn, absolute positions, one head for all queries, latent states, ALiBi.
KINDS_OF_CACHES = ("llama", "mistral", "gemma3", "gpt2", "falcon", "deepseek_v3", "bloom")


@dataclass(frozen=True)
class Subject:
    """A tiny model, a plan for it, and the same plan applied by surgery."""

    name: str
    model: nn.Module
    plan: Plan
    oracle: nn.Module
    sites: tuple[str, ...]

    @property
    def linearized(self) -> tuple[str, ...]:
        """Names of the sites that the plan replaces."""
        return tuple(site.name for site in self.plan.rewritten)


@dataclass(frozen=True)
class Run:
    """One use of the compiled model.

    Args:
        subject: What was run.
        graphs: The rewritten graphs, in the order of their compilation.
        logits: What the compiled model said, [B, T, V] (or hidden states, for encoders).
        expected: What the oracle says, likewise.
        dense: What the model says without the plan.
        cache: The cache that was used, if any.
    """

    subject: Subject
    graphs: tuple[GraphModule, ...]
    logits: Tensor
    expected: Tensor
    dense: Tensor
    cache: Any = None


@cache
def subject(
    name: str,
    implementation: str,
    linearized: tuple[int, ...] | None = None,
    input: str = "normed",
    layers: int = LAYERS,
    dtype: torch.dtype = torch.float32,
    states: States = NO_STATES,
) -> Subject:
    """Build a family's model, plan and oracle.

    Without ``linearized`` the first layer is linear; of an encoder-decoder, both first layers.
    """
    if linearized is None:
        linearized = tuple(range(0, len(BY_NAME[name].attention) * layers, layers))
    model = make(name, implementation, layers=layers)
    enliven(model)
    model.to(dtype)
    sites = BY_NAME[name].site_names(layers)
    width, heads = value_width(model, name, mixed=states.mixed) if states else (0, 0)
    plan = random_plan(
        model, sites, linearized, HIDDEN, input, states=states, value_width=width, heads=heads
    )
    return Subject(name, model, plan, linearize_by_surgery(model, plan), tuple(sites))


def value_width(model: nn.Module, name: str, *, mixed: bool) -> tuple[int, int]:
    """Return the width of what maps read of the values, and the number of heads of it.

    Args:
        model: Of the family.
        name: The family.
        mixed: Whether each query head mixes values.
    """
    found: list[tuple[int, int]] = []

    def look(graph_module: GraphModule, _: Any) -> Any:
        for one in match(graph_module).found:
            assert not isinstance(one.value_path, str), one.value_path
            shape = one.value_path.new.meta["example_value"].shape
            value = one.value_path.new.meta["example_value"]
            heads = query_heads(one.mixed.meta["example_value"], value) if mixed else shape[1]
            found.append((int(heads) * int(shape[3]), int(heads)))
        return graph_module.forward

    with torch.no_grad():
        torch.compile(lambda **given: model(**given), backend=look)(**full_inputs(name))
    torch._dynamo.reset()
    return found[0]


def enliven(model: nn.Module) -> None:
    """Give every weight a size at which attention is sharp and every layer matters.

    transformers initialises with a deviation of 0.02: at that size attention is uniform, and a
    wrong position or mask would drown in rounding.
    """
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(noise * (2.0 / parameter.shape[-1] ** 0.5))
            else:
                parameter.add_(0.1 * noise)


def main_output(output: Any) -> Tensor:
    """Return the logits, or an encoder's last hidden state."""
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def compile_with(model: nn.Module, plan: Plan, **more: Any) -> Any:
    """Compile a model by the backend's name, lowered by nothing at all."""
    return torch.compile(model, backend="nbl", options={"plan": plan, "lowering": "eager"}, **more)


@cache
def full_run(name: str, implementation: str, **of_subject: Any) -> Run:
    """Run the whole model once without a cache; every position's output is kept."""
    one = subject(name, implementation, **of_subject)
    given = full_inputs(name)
    with rewritten_graphs() as graphs, torch.no_grad():
        logits = main_output(compile_with(one.model, one.plan)(**given))
        expected, dense = main_output(one.oracle(**given)), main_output(one.model(**given))
    return Run(one, tuple(graphs), logits, expected, dense)


@cache
def dynamic_run(name: str, implementation: str, **of_subject: Any) -> Run:
    """Run with ``dynamic=True`` at one shape, then at another; keep what came of the second."""
    one = subject(name, implementation, **of_subject)
    compiled = compile_with(one.model, one.plan, dynamic=True)
    other = full_inputs(name, batch=3, length=10)
    with rewritten_graphs() as graphs, torch.no_grad():
        compiled(**full_inputs(name))
        logits = main_output(compiled(**other))
        expected, dense = main_output(one.oracle(**other)), main_output(one.model(**other))
    return Run(one, tuple(graphs), logits, expected, dense)


def one_pass(name: str, implementation: str) -> Run:
    """Return the family's usual run without a cache.

    A family's first spelling of attention is traced for one shape, the others with symbolic sizes.
    Of decoders, whose runs with a cache do the former too, the first one reads the residual stream
    and has symbolic sizes as well.
    """
    if implementation != BY_NAME[name].implementations[0]:
        return dynamic_run(name, implementation)
    if BY_NAME[name].kind == "decoder":
        return dynamic_run(name, implementation, input="residual")
    return full_run(name, implementation)


def usual_caches(name: str) -> tuple[tuple[str, str], ...]:
    """Return the pairs (spelling of attention, cache) that a decoder is run with.

    All caches where they are of a kind of their own. The first pairs belong to everyday's tests.
    """
    first, *others = BY_NAME[name].implementations
    static = [(other, "StaticCache") for other in others]
    if name in KINDS_OF_CACHES:
        return (*((first, c) for c in CACHES), *static)
    return ((first, "DynamicCache"), *(static or [(first, "StaticCache")]))


def spelling_parameters() -> list[Any]:
    """Return the parameters (family, spelling) of tests that look at ``one_pass``.

    Decoders whose caches are as others have them are looked at with a cache every day.
    """
    return [
        pytest.param(
            one.name,
            spelling,
            id=f"{one.name}-{spelling}",
            marks=[
                pytest.mark.xdist_group(one.name),
                *([] if own else [pytest.mark.thorough]),
            ],
        )
        for one in ARCHITECTURES
        for own in (one.kind != "decoder" or one.name in KINDS_OF_CACHES,)
        for spelling in one.implementations
    ]


def decoder_parameters() -> list[Any]:
    """Return the parameters (family, spelling, cache) of tests that look at ``decoding``.

    Every day each family has one pair, those whose cache is of a kind of its own have three.
    """
    return [
        pytest.param(
            one.name,
            *pair,
            marks=[
                pytest.mark.xdist_group(one.name),
                *([pytest.mark.thorough] if i >= everyday else []),
            ],
        )
        for one in ARCHITECTURES
        if one.kind == "decoder"
        for everyday in (3 if one.name in KINDS_OF_CACHES else 1,)
        for i, pair in enumerate(usual_caches(one.name))
    ]


def full_inputs(name: str, **shape: int) -> dict[str, Any]:
    """Return the inputs of one pass without a cache."""
    given: dict[str, Any] = inputs(name, **shape)
    if BY_NAME[name].kind in ("decoder", "encoder-decoder"):
        given["use_cache"] = False
    return given


@cache
def generation(
    name: str,
    implementation: str,
    cache_kind: str,
    *,
    padded: bool = False,
    steps: int = STEPS,
    **of_subject: Any,
) -> Run:
    """Generate greedily with a cache; the oracle reads the whole result at once without one.

    Args:
        name: The family.
        implementation: ``"sdpa"`` or ``"eager"``.
        cache_kind: One of ``CACHES``.
        padded: Whether the prompts are padded on the left.
        steps: Number of decode steps after the prefill.
        of_subject: Passed on to ``subject``.
    """
    one = subject(name, implementation, **of_subject)
    given = prompt(name, padded)
    past = new_cache(one, cache_kind)
    with rewritten_graphs() as graphs, torch.no_grad():
        undo = compile_forward(one.model, one.plan)
        try:
            result = generate(one.model, given, steps, past_key_values=past)
        finally:
            undo()
        expected = logits_of(one.oracle, result.sequences, given, steps)
        dense = logits_of(one.model, result.sequences, given, steps)
    return Run(one, tuple(graphs), torch.stack(result.logits, dim=1), expected, dense, past)


def decoding(name: str, implementation: str, cache_kind: str) -> Run:
    """Return the family's usual run with a cache.

    A family's first spelling of attention runs 32 steps on padded prompts with the caches of
    transformers; a growing cache is otherwise given one step, which spares a third trace.
    """
    if BY_NAME[name].kind == "encoder-decoder":
        return generation(name, implementation, cache_kind, steps=1, linearized=(LAYERS,))
    if implementation == BY_NAME[name].implementations[0] and not cache_kind.startswith("nbl"):
        return generation(name, implementation, cache_kind, padded=True)
    if cache_kind in ("DynamicCache", "nbl dynamic"):
        return generation(name, implementation, cache_kind, steps=1)
    return generation(name, implementation, cache_kind)


def compile_forward(model: nn.Module, plan: Plan) -> Callable[[], None]:
    """Compile ``model.forward``, the usual pattern for ``generate``; return what undoes it."""
    model.forward = compile_with(model.forward, plan)

    def undo() -> None:
        del model.forward

    return undo


def new_cache(one: Subject, kind: str) -> Cache:
    """Return a fresh cache of one of the ``CACHES``."""
    config = one.model.config
    if kind.startswith("nbl"):
        return nbl.cache(one.model, one.plan, CACHE_LENGTH, implementation=kind.split()[1])
    if kind == "StaticCache":
        own: Cache = StaticCache(config=config, max_cache_len=CACHE_LENGTH)
    else:
        own = DynamicCache(config=config)
    if config.is_encoder_decoder:
        return EncoderDecoderCache(own, DynamicCache(config=config))
    return own
