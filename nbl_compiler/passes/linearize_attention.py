"""Put the plan's linear maps in place of attention (NBL, arXiv 2505.21077, section 3.1).

    before   q, k, v = x Wqᵀ, x Wkᵀ, x Wvᵀ;  rotary;  cache;  y = attention(q, k, v) Woᵀ
    after    y = x Wᵀ + b        x [..., T, d], W [d_out, d], b [d_out], y [..., T, d_out]
             y = [x, s] Wᵀ + b   where the plan has value states s (``emit_states.py``)
             y = scale ⊙ (x codesᵀ) + b   where the weights are int8 (``matrices.py``)

x is the hidden state that the projections read (``input="normed"``), or the residual stream in
front of its norm (``input="residual"``); the plan says which it was calibrated for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from nbl_compiler.int8_weights import Quantize
from nbl_compiler.lowering.int8_linear import int8_linear
from nbl_compiler.passes.base import PassReport
from nbl_compiler.passes.emit_states import emit_input
from nbl_compiler.passes.graph_tools import Topology, example_value
from nbl_compiler.passes.lifting import lift
from nbl_compiler.passes.matrices import holds_int8, lift_matrix, rounding_notes
from nbl_compiler.passes.query_heads import query_heads
from nbl_compiler.passes.rewrite_sites import check_dtype, check_shapes, rewrite_sites
from nbl_compiler.passes.sites import AttentionMatch, load_matches, store_linearized
from nbl_compiler.plans import Plan, Site
from nbl_compiler.value_states import BUCKETS, States, states_of


@dataclass(frozen=True)
class LinearizeAttention:
    """Rewrite every matched attention site that the plan decided to rewrite.

    Raises (when called):
        PlanMismatchError: if a site's map does not have the shape of the site.
        UnsupportedDtypeError: if the model computes in a dtype without a floating matmul here.
    """

    plan: Plan
    name: str = "linearize_attention"
    quantize: Quantize = "auto"

    def __call__(self, graph_module: GraphModule) -> PassReport:
        found = load_matches(graph_module).found
        plan = self.plan
        rewriting = partial(rewrite, quantize=self.quantize)
        done, report = rewrite_sites(graph_module, plan, "attention", found, rewriting)
        dropped = (
            _cache_to_drop(graph_module, match, states_of(plan.site(match.site).details))
            for match in done
        )
        store_linearized(graph_module, tuple(dropped))
        notes = rounding_notes(plan, done, "attention", self.quantize)
        return replace(report, notes=notes)


def rewrite(
    graph_module: GraphModule,
    match: AttentionMatch,
    site: Site,
    plan: Plan,
    quantize: Quantize = "auto",
) -> None:
    """Replace one site's output by the plan's map."""
    source = match.residual if site.details.get("input") == "residual" else match.hidden
    like, target = example_value(source), example_value(match.output)
    assert isinstance(like, Tensor)
    assert isinstance(target, Tensor)
    check_dtype(site, like)
    states = states_of(site.details)
    _check_shapes(site, match, like.shape[-1], target.shape[-1])
    int8 = holds_int8(site, match.weights, quantize)
    weight = plan.int8_weight(site, like) if int8 else plan.joined_weight(site, like)
    lifted = [
        *lift_matrix(graph_module, f"{site.name}_weight", weight),
        lift(graph_module, f"{site.name}_bias", plan.tensor(site, "bias", like)),
    ]
    meta = {**match.output.meta, "nbl": {"site": site.name, "pass": "linearize_attention"}}
    read = emit_input(
        graph_module, match, source, states, meta, _gates(graph_module, site, plan, like)
    )
    graph = graph_module.graph
    with graph.inserting_after(match.output):
        new = graph.call_function(int8_linear if int8 else F.linear, (read, *lifted))
    new.meta.update(meta)
    if target.dtype != like.dtype:
        with graph.inserting_after(new):
            new = graph.call_method("to", (new, target.dtype))
        new.meta.update(meta)
    match.output.replace_all_uses_with(new)


def _gates(
    graph_module: GraphModule, site: Site, plan: Plan, like: Tensor
) -> tuple[Node, Node] | None:
    """Return the gates of mixed values as graph inputs, if the site's map reads such."""
    if not states_of(site.details).mixed:
        return None
    weight, offset = (
        lift(graph_module, f"{site.name}_{name}", plan.tensor(site, name, like))
        for name in ("gates", "gate_offsets")
    )
    return weight, offset


def _check_shapes(site: Site, match: AttentionMatch, width_in: int, width_out: int) -> None:
    """Raise ``PlanMismatchError`` if the plan's tensors do not fit the site."""
    wanted: dict[str, tuple[int, ...]] = {"weight": (width_out, width_in), "bias": (width_out,)}
    states = states_of(site.details)
    if states and not isinstance(match.value_path, str):
        value = example_value(match.value_path.new)
        assert isinstance(value, Tensor)
        width = int(value.shape[1]) * int(value.shape[3])
        if states.taps:
            wanted["taps"] = (states.taps, width_out, width)
        if states.averages:
            wanted["averages"] = (2, width_out, width)
        if states.mixed:
            mixed, hidden = example_value(match.mixed), example_value(match.hidden)
            assert isinstance(mixed, Tensor)
            assert isinstance(hidden, Tensor)
            heads = query_heads(mixed, value)
            wanted["mix"] = (width_out, heads * int(value.shape[3]))
            wanted["gates"] = (heads, 1 + len(BUCKETS), int(hidden.shape[-1]))
            wanted["gate_offsets"] = (heads, 1 + len(BUCKETS))
    check_shapes(site, wanted)


def _cache_to_drop(
    graph_module: GraphModule, match: AttentionMatch, states: States
) -> AttentionMatch:
    """Return the match with the cache writes and appends that go: those of keys, or all."""
    if not states or isinstance(match.value_path, str):
        return match
    values = Topology(graph_module).forward(match.value_path.new)
    return replace(
        match,
        cache_writes=tuple(n for n in match.cache_writes if n not in values),
        cache_appends=tuple(n for n in match.cache_appends if n not in values),
    )
