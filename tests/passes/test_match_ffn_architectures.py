"""FFN sites of every family: exact counts, names, activations and reasons."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from helpers.ffn_graphs import Trace, rebuilt_and_actual, trace
from helpers.generating import CACHE_LENGTH
from helpers.plans import random_plan
from helpers.scenarios import enliven, full_inputs
from models.architectures import ARCHITECTURES, BY_NAME, HIDDEN, inputs, make
from models.ffn_counts import EXPECTED, FFN_LAYERS
from torch import nn
from transformers import StaticCache

from nbl_compiler.passes.base import PassReport
from nbl_compiler.passes.clean_up import CleanUp
from nbl_compiler.passes.drop_cache_updates import DropCacheUpdates
from nbl_compiler.passes.ffn_sites import FFNMatch, FFNMatches, load_ffn_matches
from nbl_compiler.passes.graph_tools import shape_of
from nbl_compiler.passes.linearize_attention import LinearizeAttention
from nbl_compiler.passes.match_attention import MatchAttention
from nbl_compiler.passes.match_ffn import MatchFFN, match_ffn
from nbl_compiler.passes.private_copy import private_copy
from nbl_compiler.passes.sites import AttentionMatch, load_linearized, load_matches

NAMES = [pytest.param(a.name, marks=pytest.mark.xdist_group(a.name)) for a in ARCHITECTURES]
WITH_SITES = [p for p in NAMES if EXPECTED[str(p.values[0])].sites]
FLOAT32_NMSE = 1e-10  # several roundings of 2⁻²⁴ relative to each entry


@dataclass(frozen=True)
class Traced:
    """A tiny model and its one graph without a cache, in which both matchers ran."""

    model: nn.Module
    trace: Trace
    matches: FFNMatches
    report: PassReport

    @property
    def attention(self) -> tuple[AttentionMatch, ...]:
        """The attention sites of the graph."""
        return load_matches(self.trace.graph).found


@cache
def traced(name: str, dynamic: bool | None = None) -> Traced:
    model = make(name, layers=FFN_LAYERS)
    enliven(model)
    (only,) = trace(model, dynamic=dynamic, **full_inputs(name))
    MatchAttention()(only.graph)
    report = MatchFFN()(only.graph)
    return Traced(model, only, load_ffn_matches(only.graph), report)


def check(name: str, matches: FFNMatches) -> None:
    """Check names, order, activations and refusals against the table."""
    expected = EXPECTED[name]
    assert [m.site for m in matches.found] == list(expected.sites)
    for match in matches.found:
        projections = [p for p in (match.gate, match.up, match.down) if p is not None]
        assert match.activation == expected.activation
        assert (match.gate is not None) == expected.gated
        assert [p.transposed for p in projections] == [expected.transposed] * len(projections)
        assert match.down.rows is None
        assert (match.up.rows is not None) == expected.fused
    assert [r.site for r in matches.rejected] == list(expected.experts)
    assert {r.kind for r in matches.rejected} <= {"ffn"}
    assert all(r.reason.startswith("mixture of experts: ") for r in matches.rejected)


def test_every_architecture_has_an_expectation() -> None:
    assert set(EXPECTED) == set(BY_NAME)


@pytest.mark.parametrize("name", NAMES)
def test_sites(name: str) -> None:
    one = traced(name)
    check(name, one.matches)
    assert one.report == PassReport(matched=EXPECTED[name].sites, rejected=one.matches.rejected)


@pytest.mark.parametrize("name", ["gpt2", "phi", "gptj", "llama", "phi3", "opt", "t5"])
def test_sites_with_dynamic_shapes(name: str) -> None:
    """There ``math.pi`` of a written-out activation is a symbol, and so are sizes in reshapes."""
    check(name, traced(name, dynamic=True).matches)


@pytest.mark.parametrize("name", NAMES)
def test_sites_after_attention_was_linearized(name: str) -> None:
    one = traced(name)
    graph = private_copy(one.trace.graph)
    names = BY_NAME[name].site_names(FFN_LAYERS)
    plan = random_plan(one.model, names, range(len(names)), HIDDEN)
    for step in (MatchAttention(), LinearizeAttention(plan), DropCacheUpdates()):
        step(graph)
    assert [m.site for m in load_linearized(graph)] == names
    before = match_ffn(graph)
    check(name, before)
    CleanUp()(graph)
    assert match_ffn(graph) == before


@pytest.mark.parametrize("name", WITH_SITES)
def test_names_are_modules_and_not_those_of_attention(name: str) -> None:
    one, expected = traced(name), EXPECTED[name]
    modules = dict(one.model.named_modules())
    attention = {m.site for m in one.attention}
    for match in one.matches.found:
        assert match.site in modules
        assert match.site not in attention
        inside = any(site.startswith(match.site + ".") for site in attention)
        assert inside == expected.whole_layers


@pytest.mark.parametrize("name", WITH_SITES)
def test_every_parameter_of_the_module_is_a_weight(name: str) -> None:
    one, expected = traced(name), EXPECTED[name]
    for match in one.matches.found:
        if not expected.whole_layers:
            parameters = list(one.model.get_submodule(match.site).parameters())
            assert len(match.weights) == len(parameters)
        if expected.weights is not None:
            assert len(match.weights) == expected.weights


@pytest.mark.parametrize("name", WITH_SITES)
def test_regions_are_closed(name: str) -> None:
    one = traced(name)
    position = {node: i for i, node in enumerate(one.trace.graph.graph.nodes)}
    for match in one.matches.found:
        before, after = shape_of(match.hidden), shape_of(match.output)
        assert before == after
        order = [position[n] for n in (match.hidden, *match.interior, match.output)]
        assert order == sorted(order)
        inside = {*match.interior, match.output}
        assert match.anchor in inside
        for node in match.interior:
            assert set(node.users) <= inside
        sources = {s for node in inside for s in node.all_input_nodes} - inside
        assert match.hidden in sources


@pytest.mark.parametrize("name", WITH_SITES)
def test_rebuilt_from_the_match(name: str) -> None:
    """Gate and up, their order, the activation, rows and transposes are what the model computes."""
    one = traced(name)
    for match in one.matches.found:
        rebuilt, actual = rebuilt_and_actual(one.trace, match)
        error = (rebuilt - actual).square().mean() / actual.double().var()
        assert error < FLOAT32_NMSE


@pytest.mark.parametrize("name", ["phi", "gptj", "falcon", "cohere"])
def test_parallel_blocks_read_the_same_hidden_state(name: str) -> None:
    one = traced(name)
    assert [m.hidden for m in one.matches.found] == [m.hidden for m in one.attention]
    assert len(one.attention) == FFN_LAYERS


def test_gpt_neox_has_a_norm_of_its_own_for_each_branch() -> None:
    one = traced("gpt_neox")
    assert len({m.hidden for m in (*one.matches.found, *one.attention)}) == 2 * FFN_LAYERS


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_decode_with_a_static_cache(name: str) -> None:
    model = make(name, layers=FFN_LAYERS)
    past = StaticCache(config=model.config, max_cache_len=CACHE_LENGTH)
    ids = inputs(name)["input_ids"]
    with torch.no_grad():
        model(input_ids=ids, past_key_values=past)
    (only,) = trace(model, input_ids=ids[:, :1], past_key_values=past)
    MatchAttention()(only.graph)
    matches = match_ffn(only.graph)
    check(name, matches)
    assert [width_and_tokens(m) for m in matches.found] == [(HIDDEN, 1)] * FFN_LAYERS


def width_and_tokens(match: FFNMatch) -> tuple[object, object]:
    """Return the size of the hidden state's last two dimensions, in that order."""
    *_, tokens, width = shape_of(match.hidden) or ()
    return width, tokens


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_routed_experts_in_every_spelling(implementation: str) -> None:
    model = make("mixtral", layers=FFN_LAYERS)
    model.set_experts_implementation(implementation)
    (only,) = trace(model, **full_inputs("mixtral"))
    check("mixtral", match_ffn(only.graph))
