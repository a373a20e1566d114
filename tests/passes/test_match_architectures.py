"""Every family, each spelling of attention, each kind of cache: exact counts, names and reasons."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo
from helpers.recording import found, rejected, rewritten, rewritten_graphs
from helpers.scenarios import (
    LAYERS,
    Run,
    compile_with,
    decoder_parameters,
    decoding,
    dynamic_run,
    full_inputs,
    full_run,
    main_output,
    one_pass,
    spelling_parameters,
    subject,
)
from helpers.surgery import linearize_by_surgery
from models.architectures import ARCHITECTURES, BY_NAME
from torch import nn
from torch.fx import GraphModule, Node

from nbl_compiler.passes.graph_tools import example_value, is_weight
from nbl_compiler.passes.sites import load_matches

SPELLINGS = spelling_parameters()
OTHERS = [
    pytest.param(a.name, marks=pytest.mark.xdist_group(a.name))
    for a in ARCHITECTURES
    if a.kind != "decoder"
]
DECODERS = decoder_parameters()
TRANSLATORS = [p for p in SPELLINGS if BY_NAME[str(p.values[0])].kind == "encoder-decoder"]


def check(run: Run, sites: list[str], cross: list[str], reason: str = "cross-attention") -> None:
    """Check one run's graphs: what was found, rewritten and rejected in each of them."""
    assert run.graphs
    wanted = [name for name in sites if name in run.subject.linearized]
    for graph in run.graphs:
        assert found(graph) == sites
        assert rewritten(graph) == wanted
        assert [r.site for r in rejected(graph)] == cross
        for refusal in rejected(graph):
            assert refusal.reason.startswith(reason)


def cross_names(name: str) -> list[str]:
    """Return the names of the cross-attention sites."""
    path = BY_NAME[name].cross_attention
    return [path.format(i) for i in range(LAYERS)] if path else []


@pytest.mark.parametrize(("name", "implementation"), SPELLINGS)
def test_without_a_cache(name: str, implementation: str) -> None:
    run = one_pass(name, implementation)
    assert len(run.graphs) == 1, "a second shape must not compile again"
    check(run, list(run.subject.sites), cross_names(name))
    modules = dict(run.subject.model.named_modules())
    assert all(site in modules for site in (*run.subject.sites, *cross_names(name)))


@pytest.mark.parametrize(("name", "implementation"), SPELLINGS)
def test_a_site_knows_every_matrix_of_its_module(name: str, implementation: str) -> None:
    """By these a plan is refused for another model; some families multiply by ``weight.T``."""
    (graph,) = one_pass(name, implementation).graphs
    matrices = [
        node
        for node in graph.graph.find_nodes(op="placeholder")
        if is_weight(node) and example_value(node).dim() == 2
    ]
    for match in load_matches(graph).found:
        own = {node for node in matrices if is_inside(node, match.site)}
        assert own
        assert own <= set(match.weights)


def is_inside(weight: Node, site: str) -> bool:
    """Tell whether a graph input is a projection's matrix in the module at a path."""
    name = _bare(weight.name.replace("_modules_", "_"))  # Dynamo spells SelfAttention another way
    is_table = "relativeattentionbias" in name  # of T5, which makes masks
    return _bare(site) in name and not is_table


def _bare(name: str) -> str:
    return name.replace("_", "").replace(".", "").lower()


@pytest.mark.parametrize("name", OTHERS)
def test_residual_input_with_dynamic_shapes(name: str) -> None:
    run = dynamic_run(name, BY_NAME[name].implementations[0], input="residual")
    assert len(run.graphs) == 1, "a second shape must not compile again"
    check(run, list(run.subject.sites), cross_names(name))


@pytest.mark.parametrize(("name", "implementation", "cache"), DECODERS)
def test_prefill_and_decode(name: str, implementation: str, cache: str) -> None:
    run = decoding(name, implementation, cache)
    assert len(run.graphs) >= 2
    check(run, list(run.subject.sites), [])


@pytest.mark.parametrize(("name", "implementation"), TRANSLATORS)
@pytest.mark.parametrize("cache", ["DynamicCache", "StaticCache"])
def test_cross_attention_from_a_cache(name: str, implementation: str, cache: str) -> None:
    """At decode the keys and values of cross-attention come out of the cache, unprojected."""
    run = decoding(name, implementation, cache)
    prefill, decode = run.graphs
    decoder = list(run.subject.sites[LAYERS:])
    check(Run(**{**vars(run), "graphs": (prefill,)}), decoder, cross_names(name))
    reason = "cross-attention or missing projection"
    check(Run(**{**vars(run), "graphs": (decode,)}), decoder, cross_names(name), reason)


def run_compiled(
    call: nn.Module, given: dict[str, Any], name: str, implementation: str = "sdpa", **more: Any
) -> tuple[list[GraphModule], Any]:
    """Run ``call``, a family's model or something around it, compiled with the family's plan."""
    plan = subject(name, implementation, **more).plan
    with rewritten_graphs() as graphs, torch.no_grad():
        output = compile_with(call, plan)(**given)
    return graphs, output


class Wrapper(nn.Module):
    """A user's module around a model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.language_model = inner

    def forward(self, **given: object) -> object:
        return self.language_model(**given)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize("root", ["wrapper", "base model"])
def test_names_hold_from_any_root(name: str, root: str) -> None:
    one = subject(name, "sdpa")
    call = Wrapper(one.model) if root == "wrapper" else one.model.base_model
    (graph,), _ = run_compiled(call, full_inputs(name), name)
    before, cut = ("language_model.", "") if root == "wrapper" else ("", base_prefix(one.model))
    assert found(graph) == [before + site.removeprefix(cut) for site in one.sites]
    modules = dict(call.named_modules())
    assert all(site in modules for site in found(graph))
    assert rewritten(graph) == list(one.linearized)


def base_prefix(model: nn.Module) -> str:
    """Return the path of the base model inside the model with a head, with its dot."""
    return model.base_model_prefix + "."


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_dtypes_match_alike(name: str, dtype: torch.dtype) -> None:
    run = full_run(name, "sdpa", **({} if dtype == torch.float32 else {"dtype": dtype}))
    check(run, list(run.subject.sites), [])
    assert run.logits.dtype == dtype


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_returned_attention_weights_are_a_use_outside(name: str) -> None:
    one = subject(name, "eager")
    given = {**full_inputs(name), "output_attentions": True}
    with pytest.warns(UserWarning, match="is used outside the region"):
        graphs, output = run_compiled(one.model, given, name, "eager")
    assert not any(found(graph) for graph in graphs)
    refusals = [r for graph in graphs for r in rejected(graph)]
    # Recording attention weights breaks the graph: the base model is a graph's root.
    assert [r.site for r in refusals] == [s.removeprefix(base_prefix(one.model)) for s in one.sites]
    assert all("is used outside the region by `output`" in r.reason for r in refusals)
    with torch.no_grad():
        plain = one.model(**given)
    torch.testing.assert_close(main_output(output), main_output(plain))
    torch.testing.assert_close(output.attentions, plain.attentions)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_active_dropout_is_rejected(name: str, implementation: str) -> None:
    one = subject(name, implementation)
    model = copy.deepcopy(one.model).train()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):  # Llama's is 0 unless its configuration says so
            module.attention_dropout = 0.25
    with pytest.warns(UserWarning, match="dropout is active"):
        (graph,), _ = run_compiled(model, full_inputs(name), name, implementation)
    assert found(graph) == []
    assert [r.site for r in rejected(graph)] == list(one.sites)
    assert all("dropout is active" in r.reason for r in rejected(graph))


def test_flex_attention_is_rejected_and_still_runs() -> None:
    """The mask of flex attention is made under ``vmap``, whose bookkeeping must survive."""
    one = subject("llama", "sdpa")
    model = copy.deepcopy(one.model)
    model.set_attn_implementation("flex_attention")
    with pytest.warns(UserWarning, match="`flex_attention` hides queries, keys and values"):
        graphs, output = run_compiled(model, full_inputs("llama"), "llama")
    assert not any(found(graph) for graph in graphs)
    refused = [r.site for graph in graphs for r in rejected(graph)]
    assert refused == [site.removeprefix("model.") for site in one.sites]
    with torch.no_grad():
        torch.testing.assert_close(output.logits, one.model(**full_inputs("llama")).logits)


BREAKS = {
    "behind a layer": ("llama", "model.layers.0"),
    "behind attention": ("llama", "model.layers.0.self_attn"),
    "inside a layer": ("llama", "model.layers.1.mlp"),
    "behind a layer of GPT-2": ("gpt2", "transformer.h.0"),
}


def break_the_graph(*_: object) -> None:
    """A hook that TorchDynamo cannot trace through."""
    torch._dynamo.graph_break()


@pytest.mark.parametrize(
    "place",
    [
        pytest.param(place, marks=() if place == "inside a layer" else pytest.mark.thorough)
        for place in BREAKS
    ],
)
def test_a_graph_break_loses_no_site(place: str) -> None:
    """Dynamo then compiles each layer as a graph of its own, all with the same module paths."""
    name, module = BREAKS[place]
    one = subject(name, "sdpa", linearized=(0, 1))
    model = copy.deepcopy(one.model)
    model.get_submodule(module).register_forward_hook(break_the_graph)
    graphs, output = run_compiled(model, full_inputs(name), name, linearized=(0, 1))
    assert len(graphs) > 2
    assert [site for graph in graphs for site in rewritten(graph)] == list(one.sites)
    with torch.no_grad():
        expected = one.oracle(**full_inputs(name)).logits
    torch.testing.assert_close(output.logits, expected)


def test_a_graph_break_inside_attention_leaves_that_site_dense() -> None:
    one = subject("llama", "sdpa", linearized=(0, 1))
    model = copy.deepcopy(one.model)
    model.get_submodule("model.layers.0.self_attn.q_proj").register_forward_hook(break_the_graph)
    graphs, output = run_compiled(model, full_inputs("llama"), "llama", linearized=(0, 1))
    assert [site for graph in graphs for site in rewritten(graph)] == [one.sites[1]]
    (refusal,) = [r for graph in graphs for r in rejected(graph)]
    assert refusal.reason.startswith("missing projection: the query")
    oracle = linearize_by_surgery(one.model, replace(one.plan, sites=one.plan.sites[1:]))
    with torch.no_grad():
        torch.testing.assert_close(output.logits, oracle(**full_inputs("llama")).logits)
