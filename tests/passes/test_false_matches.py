"""Generated attention blocks match exactly once; what only looks like attention never does."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from helpers.attention_blocks import Attention, Form, Model, tokens
from helpers.look_alikes import LOOK_ALIKES, BareKeys, BareQueries, LookAlike
from helpers.plans import random_plan
from helpers.recording import found, rejected, rewritten, rewritten_graphs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule

import nbl_compiler as nbl
from nbl_compiler import backend
from nbl_compiler.errors import NBLWarning

# Float32 rounding of two linear layers and a norm; the maps have entries of size 1.
TOLERANCE = 1e-4


@st.composite
def forms(draw: st.DrawFn) -> Form:
    """Draw the spelling of a block."""
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    heads = kv_heads * draw(st.integers(1, 2))
    head_dim = draw(st.sampled_from([4, 8]))
    flags = ("eager", "fused", "bias", "qk_norm", "rotary", "causal", "halves")
    return Form(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        hidden=draw(st.sampled_from([heads * head_dim, 20])),
        split=heads > 1 or draw(st.booleans()),
        before=draw(st.sampled_from(["input", "linear", "block"])),
        **{flag: draw(st.booleans()) for flag in flags},
    )


@dataclass(frozen=True)
class Result:
    """One run through the backend with a plan that replaces the site that is looked at."""

    model: Model
    plan: nbl.Plan
    graph: GraphModule
    outputs: tuple[Tensor, ...]
    dense: tuple[Tensor, ...]
    warnings: list[str]


def run(form: Form, kind: type[nn.Module]) -> Result:
    """Compile a block with a plan for it and run it, and run it dense."""
    torch._dynamo.reset()
    backend._warned.clear()
    model = Model(form, kind)
    plan = random_plan(model, [model.site], [0], form.hidden)
    options = {"plan": plan, "lowering": "eager"}
    with (
        torch.no_grad(),
        rewritten_graphs() as graphs,
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        torch.manual_seed(5)  # for dropout
        outputs = torch.compile(model, backend="nbl", options=options)(*tokens(form))
        torch.manual_seed(5)
        dense = model(*tokens(form))
    own = [str(w.message) for w in caught if issubclass(w.category, NBLWarning)]
    (graph,) = graphs
    return Result(model, plan, graph, outputs, dense, own)


def linearized(result: Result) -> Tensor:
    """Return what the model says with its last attention replaced by the plan's map."""
    maps = result.plan.sites[0].tensors
    last = result.model.blocks[-1]

    class Map(nn.Module):
        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            return F.linear(x, maps["weight"], maps["bias"])

    last.attention = Map()
    with torch.no_grad():
        (output,) = result.model(*tokens(result.model.form))
    return output


@settings(max_examples=60)
@given(forms())
def test_a_plain_block_matches_exactly_once(form: Form) -> None:
    result = run(form, Attention)
    assert found(result.graph) == [f"blocks.{i}.attention" for i in range(len(result.model.blocks))]
    assert rejected(result.graph) == ()
    assert rewritten(result.graph) == [result.model.site]
    assert not result.warnings
    expected = linearized(result)
    torch.testing.assert_close(result.outputs[0], expected, rtol=0, atol=TOLERANCE)
    assert (result.dense[0] - expected).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("look_alike", LOOK_ALIKES, ids=lambda one: one.kind.__name__)
@settings(max_examples=4)
@given(st.data())
def test_a_look_alike_is_left_as_it_is(look_alike: LookAlike, data: st.DataObject) -> None:
    form = look_alike.fit(data.draw(forms()))
    result = run(form, look_alike.kind)
    before = [f"blocks.{i}.attention" for i in range(len(result.model.blocks) - 1)]
    assert found(result.graph) == before
    assert rewritten(result.graph) == []
    for output, dense in zip(result.outputs, result.dense, strict=True):
        assert torch.equal(output, dense)

    refusals = rejected(result.graph)
    reason = look_alike.reason_for(form)
    if reason is None:
        assert refusals == ()
    else:
        assert {r.site.partition("#")[0] for r in refusals} == {result.model.site}
        assert reason in refusals[0].reason
        (warning,) = result.warnings
        assert "of the plan cannot be rewritten here" in warning
        assert reason in warning


@pytest.mark.parametrize(("kind", "operand"), [(BareQueries, "query"), (BareKeys, "key")])
@pytest.mark.parametrize("eager", [False, True])
def test_the_reason_names_what_reads_the_hidden_state(
    kind: type[nn.Module], operand: str, eager: bool
) -> None:
    """Behind a block every walk ends at some projection: that of an earlier layer."""
    result = run(replace(Form(kv_heads=4, before="block"), eager=eager), kind)
    (refusal,) = rejected(result.graph)
    assert refusal.reason.startswith(f"missing projection: {operand} reads ")
