"""Measured time of each site: its region cut out of the graph, before against after.

The values that enter a region are recorded while the model runs on the example inputs, so the
regions do real work on real values. Each is lowered on its own and timed in turns with what the
passes put in its place; what Inductor would fuse across the cut is therefore not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from nbl_compiler.dumps.values import NodeValues
from nbl_compiler.lowering.lower import lower
from nbl_compiler.timing import interleaved, seconds_of

_REPEATS = 7
_EVICTING_NUMBERS = 2**25
"""128 MiB: more than any cache."""


def time_sites(
    before: GraphModule,
    after: GraphModule,
    regions: Mapping[str, tuple[Sequence[str], Sequence[str]]],
    inputs: tuple[Sequence[Any], Sequence[Any]],
    lowering: str = "inductor",
) -> dict[str, tuple[float, float]]:
    """Return site → median seconds before and after.

    Args:
        before: The graph as traced.
        after: The graph after the passes.
        regions: Site → names of its nodes in both graphs.
        inputs: One value per input of both graphs.
        lowering: As in ``Options``.
    """
    pieces = []
    for graph_module, values, side in ((before, inputs[0], 0), (after, inputs[1], 1)):
        cut = {site: _cut(graph_module, names[side]) for site, names in regions.items()}
        entering = {node.name for piece, nodes in cut.values() for node in nodes}
        seen = NodeValues.on(graph_module, values, entering).noted
        pieces.append({
            site: _ready(piece, [seen[node.name] for node in nodes], lowering)
            for site, (piece, nodes) in cut.items()
        })  # fmt: skip
    times = {}
    for site in regions:
        timing = interleaved({"before": pieces[0][site], "after": pieces[1][site]}, _REPEATS)
        times[site] = (timing["before"].median, timing["after"].median)
    return times


def region_seconds(
    graph_module: GraphModule,
    regions: Mapping[str, Sequence[str]],
    inputs: Sequence[Any],
    lowering: str = "inductor",
) -> dict[str, float]:
    """Return site → median seconds of its region in one graph, its weights not in any cache.

    Regions of the same operations on the same shapes are compiled and timed once.

    Args:
        graph_module: The graph.
        regions: Site → names of its nodes.
        inputs: One value per input of the graph.
        lowering: As in ``Options``.
    """
    cut = {site: _cut(graph_module, names) for site, names in regions.items()}
    alike = {site: _signature(piece) for site, (piece, _) in cut.items()}
    first = {signature: site for site, signature in reversed(alike.items())}
    entering = {node.name for site in first.values() for node in cut[site][1]}
    seen = NodeValues.on(graph_module, inputs, entering).noted
    calls = {
        site: _ready(cut[site][0], [seen[node.name] for node in cut[site][1]], lowering)
        for site in first.values()
    }
    evict = torch.zeros(_EVICTING_NUMBERS)
    runs: dict[str, list[float]] = {site: [] for site in calls}
    for _ in range(_REPEATS):
        for site, call in calls.items():
            evict.add_(1.0)  # in a model, the other layers' weights have passed in between
            runs[site].append(seconds_of(call))
    return {site: median(runs[first[signature]]) for site, signature in alike.items()}


def _signature(piece: GraphModule) -> tuple[object, ...]:
    """Return what the time of a region depends on."""

    position = {node: i for i, node in enumerate(piece.graph.nodes)}

    def of(node: Node) -> tuple[object, ...]:
        value = node.meta.get("example_value")
        form = (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else None
        given = map_arg((node.args, node.kwargs), lambda source: position[source])
        return node.op, "" if node.op == "placeholder" else str(node.target), form, str(given)

    return tuple(map(of, piece.graph.nodes))


def _cut(graph_module: GraphModule, names: Iterable[str]) -> tuple[GraphModule, list[Node]]:
    """Return the region as a graph of its own, and the nodes whose values enter it."""
    inside = set(names)
    nodes = [node for node in graph_module.graph.nodes if node.name in inside]
    graph = Graph()
    copies: dict[Node, Node] = {}
    entering: list[Node] = []
    for node in nodes:
        for source in node.all_input_nodes:
            if source.name not in inside and source not in copies:
                copies[source] = graph.placeholder(source.name)
                copies[source].meta = dict(source.meta)
                entering.append(source)
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    leaving = [n for n in nodes if any(user.name not in inside for user in n.users)] or nodes[-1:]
    graph.output(tuple(copies[node] for node in leaving))
    return GraphModule(graph_module, graph), entering


def _ready(piece: GraphModule, values: list[Any], lowering: str) -> Callable[[], Any]:
    """Return a compiled, warm call of the region."""
    compiled = lower(piece, values, lowering)

    def call() -> Any:
        with torch.no_grad():
            return compiled(*values)

    call()
    return call
