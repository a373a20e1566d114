"""Find feed-forward (FFN) sites.

A site is the region from the hidden state x to the down projection's result y::

    x ─ up ─ act ─ down ─ y                   plain

    x ─ gate ─ act ─┐
      ─ up ──────── × ─ down ─ y              gated; gate and up may be one fused projection

Between these lie only reshapes, casts and dropout that is off. The activation is recognised by its
values (``activation_calls.py``), everything else by data flow. Module paths only give the name:
the deepest module that holds the region (``model.layers.3.mlp``), which is the whole layer where
its linears lie there (``encoder.layer.3`` in BERT, ``model.decoder.layers.3`` in OPT). Should an
attention site of the graph have that name, ``.ffn`` is appended, since plans name tensors by their
site alone; so run ``MatchAttention`` first.

y is as wide as x, since an FFN adds to a residual stream; heads and projectors are not. Shared
experts are ordinary sites, routed experts are rejected. Activations elsewhere (poolers, routers,
gates of attention, state-space models, heads with a norm) are no FFNs and not listed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch.fx import GraphModule, Node

from nbl_compiler.passes.activation_calls import ActivationRegion, find_activations, identify
from nbl_compiler.passes.base import PassReport, Rejected, source_line
from nbl_compiler.passes.elementwise import ValueFlow, skip_passes
from nbl_compiler.passes.ffn_refusals import (
    Candidate,
    no_parameter,
    odd_factor,
    other_width,
    unknown_activation,
    width,
    without_down,
    without_projection,
)
from nbl_compiler.passes.ffn_region import (
    find_leak,
    find_overwrite,
    follow,
    interior_of,
    is_expert_product,
    matching_ends,
    reaches_experts,
    selects_tokens,
)
from nbl_compiler.passes.ffn_sites import (
    FFNMatch,
    FFNMatches,
    Projection,
    is_projection,
    layer_behind,
    read_projection,
    store_ffn_matches,
    with_added_bias,
)
from nbl_compiler.passes.graph_tools import Topology, common_module
from nbl_compiler.passes.hidden_state import Refusal
from nbl_compiler.passes.sites import load_linearized, load_matches, unique_names


@dataclass(frozen=True)
class MatchFFN:
    """Find FFN sites and leave them on the graph; changes nothing.

    Rejection reasons: mixture of experts; an unknown activation; gate and up that read different
    hidden states; a missing projection; an operation in between, adapters included; a weight that
    is no parameter; an intermediate used outside the region; active dropout; an output of another
    width than the hidden state.
    """

    name: str = "match_ffn"

    def __call__(self, graph_module: GraphModule) -> PassReport:
        matches = match_ffn(graph_module)
        store_ffn_matches(graph_module, matches)
        return PassReport(matched=tuple(m.site for m in matches.found), rejected=matches.rejected)


@dataclass(frozen=True)
class _Site:
    hidden: Node
    output: Node
    interior: tuple[Node, ...]
    activation: str
    gate: Projection | None
    up: Projection
    down: Projection


def match_ffn(graph_module: GraphModule) -> FFNMatches:
    """Return every FFN site of the graph, matched or rejected."""
    topology = Topology(graph_module)
    flow = ValueFlow(graph_module, topology)
    results: list[tuple[Candidate, _Site | Refusal]] = []
    claimed: set[Node] = set()
    for region in find_activations(graph_module, flow, is_projection):
        candidate = _candidate(region)
        if candidate is None or claimed & candidate.landmarks:
            continue
        result = _check(candidate, flow, topology)
        if result is not None:
            claimed |= candidate.landmarks
            results.append((candidate, result))
    return _named(graph_module, results, topology)


def _named(
    graph_module: GraphModule, results: list[tuple[Candidate, _Site | Refusal]], topology: Topology
) -> FFNMatches:
    attention = load_matches(graph_module)
    taken = {match.site for match in (*attention.found, *load_linearized(graph_module))}
    taken |= {rejected.site for rejected in attention.rejected}
    paths = [common_module([skip_passes(c.result), *c.landmarks]) for c, _ in results]
    names = unique_names([f"{p}.ffn" if p and p in taken else p for p in paths], "ffn")
    found: list[FFNMatch] = []
    rejected: list[Rejected] = []
    for name, (candidate, result) in zip(names, results, strict=True):
        anchor = skip_passes(candidate.result)
        if isinstance(result, Refusal):
            source = source_line(anchor)
            node, passed = result.node.name, result.passed
            rejected.append(Rejected(name, "ffn", node, result.reason, source, passed))
        else:
            weights = _weights(result, topology)
            found.append(FFNMatch(site=name, anchor=anchor, **vars(result), weights=weights))
    return FFNMatches(tuple(found), tuple(rejected))


def _weights(site: _Site, topology: Topology) -> tuple[Node, ...]:
    projections = [p for p in (site.gate, site.up, site.down) if p is not None]
    weights = {w for p in projections for w in (p.weight, p.bias) if w is not None}
    return tuple(sorted(weights, key=topology.position.__getitem__))


def _candidate(region: ActivationRegion) -> Candidate | None:
    """Follow the region's exits; prefer one that reaches a linear layer."""
    if not region.exits or not region.roots:
        return None
    paths = [(result, follow(result)) for result in region.exits]
    result, path = next((p for p in paths if p[1].down is not None), paths[-1])
    return Candidate(region, result, path, tuple(map(layer_behind, region.roots)))


def _check(candidate: Candidate, flow: ValueFlow, topology: Topology) -> _Site | Refusal | None:
    """Check that an activation is an FFN's; None if it does not even look like one."""
    path = candidate.path
    experts = next((layer for layer in candidate.layers if is_expert_product(layer)), None)
    if experts is not None:
        reason = f"mixture of experts: `{experts.name}` multiplies by the weights of routed experts"
        return Refusal(experts, reason) if reaches_experts(path.end, flow) else None
    inner = read_projection(candidate.region.roots[0])
    if inner is None or len(candidate.layers) > 1:
        return without_projection(candidate)
    other = None if path.factor is None else read_projection(path.factor)
    if path.factor is not None and other is None:
        return _passed(1, odd_factor(path, inner, flow))
    if path.down is None:
        return _passed(1, without_down(candidate, inner, flow))
    name = identify(candidate.region, candidate.result)
    if width(path.down) != width(inner.source):
        known = name is not None and not path.refusal
        return _passed(2, other_width(path.down, inner)) if known else None
    if name is None:
        return _passed(2, unknown_activation(candidate, flow))
    gate, up = (None, inner) if other is None else (inner, other)
    return _passed(3, path.refusal or _site(path.down, gate, up, name, flow, topology))


def _passed(steps: int, result: _Site | Refusal | None) -> _Site | Refusal | None:
    """Note in a refusal how far the candidate came."""
    return replace(result, passed=steps) if isinstance(result, Refusal) else result


def _site(
    down_layer: Node,
    gate: Projection | None,
    up: Projection,
    activation: str,
    flow: ValueFlow,
    topology: Topology,
) -> _Site | Refusal:
    output = with_added_bias(down_layer)
    down = read_projection(output)
    if down is None:
        return no_parameter(down_layer)
    ends = matching_ends([p for p in (gate, up) if p is not None], output)
    if isinstance(ends, Refusal):
        return ends
    hidden, output = ends
    if selects_tokens(hidden):
        reason = f"mixture of experts: `{hidden.name}` holds the tokens that were routed here"
        return Refusal(hidden, reason)
    interior = interior_of(hidden, output, flow)
    refusal = find_overwrite(hidden, interior, output, topology) or find_leak(interior, output)
    return refusal or _Site(hidden, output, interior, activation, gate, up, down)
