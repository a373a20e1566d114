"""Putting a site's value states into a graph.

    n = count_of_mask(mask)                                     once a mask
    states = value_states(rows, positions, n, w, averages)      rows: of this call, or of the cache
    states = mixed_values(rows, positions, n, x, gates)         where the map reads mixed values

A cache keeps its values then (the keys are no longer needed). A layer of ``nbl.cache`` keeps what
the states need and no more; in the graph ``nbl::stored_states`` stands for that::

    window, sums = stored_states(window, sums, v)
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import wraps
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from nbl_compiler.errors import PlanMismatchError
from nbl_compiler.lowering.mixed_values import carried_mix, mixed_values
from nbl_compiler.lowering.value_states import (
    carried_states,
    count_of_mask,
    count_without_mask,
    joined_rows,
    last_positions,
    newest_rows,
    rows_of,
    rows_without,
    stored_states,
    value_states,
    with_states,
)
from nbl_compiler.passes.emit import Emitter
from nbl_compiler.passes.graph_tools import Topology, argument, is_call, is_view, shape_of
from nbl_compiler.passes.sites import AttentionMatch
from nbl_compiler.passes.value_path import ValuePath
from nbl_compiler.value_states import Gates, States

_COUNTS = "nbl_attended_positions"


def emit_input(
    graph_module: GraphModule,
    match: AttentionMatch,
    source: Node,
    states: States,
    meta: Mapping[str, Any],
    gates: Gates | tuple[Node, Node] | None = None,
) -> Node:
    """Return the node of what a map reads: ``source`` [..., d], with states [..., d + n].

    Args:
        graph_module: The graph, changed in place.
        match: The site.
        source: The hidden state or the residual stream.
        states: What the map reads besides.
        meta: What the new nodes carry.
        gates: Of mixed values: nodes that hold them, or, in graphs that run as they are, values.

    Raises:
        PlanMismatchError: if this graph does not show what the states are made of.
    """
    if not states:
        return source
    own = {**meta, "nbl": {"site": match.site, "pass": "value_states"}}
    made = _emit_states(graph_module, match, states, own, gates)
    assert not isinstance(match.value_path, str)
    inside = set(match.interior)
    for node in Topology(graph_module).backward(match.value_path.new, lambda n: n is match.hidden):
        if node in inside:  # the value projection is part of what the site becomes
            node.meta = {**node.meta, "nbl": own["nbl"]}
    with graph_module.graph.inserting_before(match.output):
        return Emitter(graph_module.graph, meta).call(with_states, source, made)


def emit_count(graph_module: GraphModule, match: AttentionMatch) -> Node:
    """Return the node of n_t, how many positions each token attends to, [B or 1, T]."""
    assert not isinstance(match.value_path, str)
    with graph_module.graph.inserting_before(match.output):
        return _count(graph_module, match.value_path, Emitter(graph_module.graph, {}))


def _emit_states(
    graph_module: GraphModule,
    match: AttentionMatch,
    states: States,
    meta: Mapping[str, Any],
    gates: Gates | tuple[Node, Node] | None,
) -> Node:
    """Add the nodes that make a site's states [B, T, …]; return the last."""
    path = match.value_path
    if isinstance(path, str):
        raise PlanMismatchError(
            f"{match.site} reads value states, which this graph cannot give: {path}; calibrate "
            "without taps and mixed values"
        )
    if path.stand_in is not None:
        return _emit_from_own_layer(graph_module, match, path, states, meta, gates)
    with graph_module.graph.inserting_before(match.output):
        emit = Emitter(graph_module.graph, meta)
        count = _count(graph_module, path, emit)
        positions = path.positions or emit.call(last_positions, path.rows, path.new)
        return _of_rows(emit, match, path.rows, positions, count, states, gates)


def _of_rows(
    emit: Emitter,
    match: AttentionMatch,
    rows: Node,
    positions: Node,
    count: Node,
    states: States,
    gates: Gates | tuple[Node, Node] | None,
) -> Node:
    """Add the states of rows of values."""
    if not states.mixed:
        return emit.call(value_states, rows, positions, count, states.taps, states.averages)
    function, further = _gated(mixed_values, gates)
    return emit.call(function, rows, positions, count, match.hidden, *further)


def _gated(
    function: Callable[..., Any], gates: Gates | tuple[Node, Node] | None
) -> tuple[Callable[..., Any], tuple[Node, ...]]:
    """Return a function that ends with gates, and the nodes to call it with at the end."""
    assert gates is not None
    if isinstance(gates, tuple):
        return function, gates
    held = (gates.weight, gates.offset)

    @wraps(function)
    def with_gates(*args: Any) -> Any:
        like = args[0]  # values, fake where the node is made

        def own(tensor: Tensor) -> Tensor:
            if isinstance(like, FakeTensor):
                return like.fake_mode.from_tensor(tensor, static_shapes=True)
            return tensor

        return function(*args, *(own(tensor.to(like.device, args[-1].dtype)) for tensor in held))

    return with_gates, ()


def _count(graph_module: GraphModule, path: ValuePath, emit: Emitter) -> Node:
    """Add n_t; sites with the same mask share it."""
    if path.mask is None:
        return emit.call(count_without_mask, path.new, _positions_before(path, emit))
    known: dict[Node, Node] = graph_module.meta.setdefault(_COUNTS, {})
    if path.mask not in known:
        with _inserting_behind(graph_module, path.mask):
            known[path.mask] = emit.call(count_of_mask, path.mask)
    return known[path.mask]


def _positions_before(path: ValuePath, emit: Emitter) -> Any:
    """Return how many positions came before this call: a number, or a node that holds it."""
    if path.first:
        return 0
    if path.stand_in is None:
        return emit.call(rows_without, path.rows, path.new)
    length = path.stand_in.args[1]  # of all positions, as attention would see them
    return emit.call(operator.sub, length, emit.call(rows_of, path.new))


def _inserting_behind(graph_module: GraphModule, node: Node) -> Any:
    """Insert behind a node; behind all of the graph's inputs, if it is one of them."""
    if node.op == "placeholder":
        node = graph_module.graph.find_nodes(op="placeholder")[-1]
    return graph_module.graph.inserting_after(node)


def _emit_from_own_layer(
    graph_module: GraphModule,
    match: AttentionMatch,
    path: ValuePath,
    states: States,
    meta: Mapping[str, Any],
    gates: Gates | tuple[Node, Node] | None,
) -> Node:
    """Add the states where ``nbl.cache`` keeps a window of values, or sums; and what it stores."""
    site = match.site
    holder = next((n for n in path.new.users if is_call(n, {stored_states._opoverload})), None)
    if holder is None:
        raise PlanMismatchError(
            f"{site} reads value states, and the cache from nbl.cache has none for it; make the "
            "cache for the plan that the model is compiled with"
        )
    past, sums = holder.args[0], holder.args[1]
    assert isinstance(past, Node)
    assert isinstance(sums, Node)
    carried = _rows_of(sums) > 0
    if _rows_of(past) < states.rows or (carried and _rows_of(sums) != states.sums):
        raise PlanMismatchError(
            f"{site} reads {states}, and the cache from nbl.cache was made for others; make it "
            "for the plan that the model is compiled with"
        )
    graph = graph_module.graph
    path = _with_early_mask(path, holder, graph_module)
    with graph.inserting_before(holder):
        emit = Emitter(graph, meta)
        count = _count(graph_module, path, emit)
        rows = emit.call(joined_rows, past, path.new)
        new_sums = sums
        if carried:
            if states.mixed:
                function, further = _gated(carried_mix, gates)
                given = (path.new, count, past, sums, match.hidden, *further)
                both = emit.call(function, *given)
            else:
                both = emit.call(carried_states, path.new, count, past, sums, states.taps)
            result, new_sums = (emit.call(operator.getitem, both, i) for i in (0, 1))
        else:
            positions = emit.call(last_positions, rows, path.new)
            result = _of_rows(emit, match, rows, positions, count, states, gates)
        kept = emit.call(newest_rows, rows, past)
    for user in list(holder.users):
        user.replace_all_uses_with(new_sums if user.args[1] else kept)
        graph.erase_node(user)
    graph.erase_node(holder)
    return result


def _with_early_mask(path: ValuePath, holder: Node, graph_module: GraphModule) -> ValuePath:
    """Return the path with what its mask is a slice of (all of it), if the mask comes too late."""
    position = Topology(graph_module).position
    mask = path.mask
    while mask is not None and position[mask] > position[holder] and is_view(mask):
        source = argument(mask, 0, "input")
        if not isinstance(source, Node) or shape_of(source) != shape_of(mask):
            break
        mask = source
    return replace(path, mask=mask)


def _rows_of(node: Node) -> int:
    shape = shape_of(node)
    assert shape is not None
    return int(shape[2])
