"""Find attention sites.

A site is the region from the one hidden state x that the query, key and value projections read
to the output projection's result y::

    x ─ q_proj ─ (norm) ─ rotary ────────────┐
      ─ k_proj ─ (norm) ─ rotary ─ KV cache ─┤ attention ─ reshape ─ o_proj ─ y
      ─ v_proj ─────────────────── KV cache ─┘

Projections may be fused (one linear for q, k and v), low-rank (MLA: two linears with a norm in
between), ``Conv1D``s, or carry adapters; masks, positions and cache tensors enter from the side.
The region is found from data flow alone; module paths only give it its name. Anything else is
rejected with a reason (see ``docs/passes/match_attention.md``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch.fx import GraphModule, Node

from nbl_compiler.passes.attention_anchors import Anchor, find_anchors, find_opaque
from nbl_compiler.passes.attention_cache import CacheUse, cache_use
from nbl_compiler.passes.base import PassReport, Rejected, source_line
from nbl_compiler.passes.graph_tools import (
    Topology,
    common_module,
    is_active_dropout,
    is_floating,
    is_view,
    is_weight,
    projection_input,
    shape_of,
    weight_behind,
)
from nbl_compiler.passes.hidden_state import HiddenState, Refusal, find_hidden, find_residual
from nbl_compiler.passes.sites import AttentionMatch, Matches, store_matches, unique_names
from nbl_compiler.passes.value_path import find_value_path


@dataclass(frozen=True)
class MatchAttention:
    """Find attention sites and leave them on the graph; changes nothing.

    Rejection reasons: cross-attention; more than one hidden input; a missing query, key, value
    or output projection; an intermediate used outside the region; active dropout; an attention
    kernel that hides its operands.
    """

    name: str = "match_attention"

    def __call__(self, graph_module: GraphModule) -> PassReport:
        matches = match(graph_module)
        store_matches(graph_module, matches)
        return PassReport(matched=tuple(m.site for m in matches.found), rejected=matches.rejected)


def match(graph_module: GraphModule) -> Matches:
    """Return every attention site of the graph, matched or rejected."""
    topology = Topology(graph_module)
    results = [
        (anchor, _check(anchor, topology)) for anchor in find_anchors(graph_module, topology)
    ]
    names = unique_names([_name(anchor, result) for anchor, result in results], "attention")
    found: dict[tuple[Node, Node], AttentionMatch] = {}  # several anchors may share a region
    rejected: list[Rejected] = []
    for name, (anchor, result) in zip(names, results, strict=True):
        if isinstance(result, Refusal):
            source = source_line(anchor.node)
            rejected.append(
                Rejected(name, "attention", result.node.name, result.reason, source, result.passed)
            )
        else:
            region = (result.hidden.node, result.output)
            shared = found.get(region)
            found[region] = (
                _build(name, anchor, result, topology)
                if shared is None
                else replace(shared, value_path="several attentions share its output projection")
            )
    for node in find_opaque(graph_module):
        reason = (
            f"`{node.target}` hides queries, keys and values; load the model with sdpa or eager"
        )
        site = common_module([node])
        rejected.append(Rejected(site, "attention", node.name, reason, source_line(node)))
    return Matches(tuple(found.values()), tuple(rejected))


@dataclass(frozen=True)
class _Region:
    hidden: HiddenState
    output: Node
    interior: tuple[Node, ...]
    cache: CacheUse


def _name(anchor: Anchor, result: _Region | Refusal) -> str:
    """Return the path of the module that holds the site (for a refusal, as much as is known)."""
    if not isinstance(result, Refusal):
        return common_module([anchor.node, *result.hidden.projections, result.output])
    tail = _output_projection(anchor)
    return common_module([anchor.node] if isinstance(tail, Refusal) else [anchor.node, tail[0]])


def _build(name: str, anchor: Anchor, region: _Region, topology: Topology) -> AttentionMatch:
    read = (n for node in (*region.interior, region.output) for n in node.all_input_nodes)
    weights = {weight for n in read if (weight := weight_behind(n)) is not None}
    return AttentionMatch(
        site=name,
        anchor=anchor.node,
        hidden=region.hidden.node,
        residual=find_residual(region.hidden.node),
        output=region.output,
        interior=region.interior,
        cache_writes=region.cache.writes,
        cache_appends=region.cache.appends,
        weights=tuple(sorted(weights, key=topology.position.__getitem__)),
        mixed=anchor.result,
        value_path=find_value_path(region.hidden.node, anchor.operands, anchor.result, topology),
    )


def _check(anchor: Anchor, topology: Topology) -> _Region | Refusal:
    """Grow the region around an anchor, or say why it cannot be one."""
    if anchor.dropout:
        return Refusal(anchor.node, "dropout is active; call model.eval() first")
    tail = _output_projection(anchor)
    if isinstance(tail, Refusal):
        return replace(tail, passed=1)
    output, side_operands = tail
    hidden = find_hidden({**anchor.operands, **side_operands}, topology)
    if isinstance(hidden, Refusal):
        return replace(hidden, passed=2)
    refusal = _refuse_region(hidden, output, topology)
    if refusal is not None:
        return replace(refusal, passed=3)
    interior = _interior(hidden.node, output, topology)
    cache = cache_use(interior, output, topology)
    if isinstance(cache, Refusal):
        return replace(cache, passed=4)
    return _Region(hidden, output, interior, cache)


def _refuse_region(hidden: HiddenState, output: Node, topology: Topology) -> Refusal | None:
    """Say what is wrong with a region whose two ends are known, if anything is."""
    write = _write_between(hidden, output, topology)
    if write is not None:
        return Refusal(write, f"more than one hidden input: `{write.name}` overwrites the first")
    interior = _interior(hidden.node, output, topology)
    dropout = next((node for node in interior if is_active_dropout(node)), None)
    if dropout is not None:
        return Refusal(dropout, "dropout is active; call model.eval() first")
    shape_in, shape_out = shape_of(hidden.node), shape_of(output)
    if shape_in is None or shape_out is None or shape_in[:-1] != shape_out[:-1]:
        return Refusal(output, f"output of shape {shape_out} does not follow input {shape_in}")
    return None


def _write_between(hidden: HiddenState, output: Node, topology: Topology) -> Node | None:
    """Return a write into the hidden state that some of the region's readers see, if any."""
    start, end = topology.position[hidden.projections[0]], topology.position[output]
    writers = topology.writers.get(topology.storage(hidden.node), ())
    return next((w for w in writers if start < topology.position[w] < end), None)


def _interior(hidden: Node, output: Node, topology: Topology) -> tuple[Node, ...]:
    """Return the nodes that depend on ``hidden`` and that ``output`` depends on."""
    behind = topology.backward(output, stop=lambda node: node is hidden)
    reached = topology.forward(hidden)
    return tuple(
        node
        for node in behind
        if node in reached and node not in (hidden, output) and node.op != "placeholder"
    )


def _output_projection(anchor: Anchor) -> tuple[Node, dict[str, Node]] | Refusal:
    """Follow the mixed values to the one projection they all end in.

    Other activations that join them on the way (the gate of gated attention) are returned as
    operands: they too must come from the hidden state.
    """
    projections: dict[Node, None] = {}
    side: dict[str, Node] = {}
    on_path = {anchor.result}
    stack = [anchor.result]
    while stack:
        node = stack.pop()
        for user in node.users:
            if user.op == "output":
                return Refusal(
                    node, "the attention output is returned before any output projection"
                )
            if projection_input(user) is not None:
                projections[user] = None
            elif user not in on_path:
                on_path.add(user)
                stack.append(user)
        if len(on_path) > 64:
            return Refusal(anchor.node, "missing output projection")
    if not projections:
        return Refusal(anchor.node, "missing output projection")
    if len(projections) > 1:
        names = ", ".join(f"`{p.name}`" for p in projections)
        return Refusal(anchor.node, f"the attention output enters several projections: {names}")
    for node in on_path - {anchor.result}:
        for source in node.all_input_nodes:
            if source not in on_path and is_floating(source) and not is_weight(source):
                side[f"`{source.name}`"] = source
    return _restore_shape(next(iter(projections))), side


def _restore_shape(projection: Node) -> Node:
    """Return the projection, or the view that undoes the flattening of ``addmm`` (``Conv1D``)."""
    shape = shape_of(projection)
    users = list(projection.users)
    while shape is not None and len(shape) == 2 and len(users) == 1 and is_view(users[0]):
        projection = users[0]
        shape, users = shape_of(projection), list(projection.users)
    return projection
