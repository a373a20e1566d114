"""Running a graph in pieces: only what is needed, from one cut to the next.

Two routes lead through a graph with switches. On the *dense* one a switch passes the site's own
output on; on the *compressed* one it passes on what a stand-in makes of what the map reads, so that
the site's inside is not computed at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from nbl_compiler.passes.graph_tools import Topology
from nbl_compiler.passes.switches import StandIn

Values = dict[str, Any]
"""Node name → its value."""


class Route:
    """One way through a graph.

    Args:
        graph_module: The graph.
        switches: Site name → its switch, a call with arguments (what the map reads, output).
        compressed: Whether the switches pass on what stand-ins give.
        observed: Node → position until which its value must be kept.
        effects: Nodes that are run whether their value is asked for or not.
    """

    def __init__(
        self,
        graph_module: GraphModule,
        switches: Mapping[str, Node],
        compressed: bool,
        observed: Mapping[Node, int],
        effects: Iterable[Node],
    ) -> None:
        self._graph_module = graph_module
        self._topology = Topology(graph_module)
        self._site_of = {node: site for site, node in switches.items()}
        self._compressed = compressed
        self._nodes = list(graph_module.graph.nodes)
        self._last_use = self._uses(observed, effects)

    def _sources(self, node: Node) -> Iterable[Node]:
        if node in self._site_of:
            read, output = node.args
            chosen = read if self._compressed else output
            assert isinstance(chosen, Node)
            return [chosen]
        return self._topology.sources(node)

    def _uses(self, observed: Mapping[Node, int], effects: Iterable[Node]) -> dict[Node, int]:
        """Return every node that is needed, with the position behind which it is not."""
        position = self._topology.position
        last = dict(observed)
        end = max(observed.values(), default=0)
        for node in effects:
            if position[node] <= end:
                last.setdefault(node, position[node])
        for node in reversed(self._nodes):
            if node in last:
                last[node] = max(last[node], position[node])
                for source in self._sources(node):
                    last[source] = max(last.get(source, 0), position[node])
        return last

    def advance(
        self,
        values: Values,
        inputs: Values,
        start: int,
        stop: int,
        stand_ins: Mapping[str, StandIn],
    ) -> Values:
        """Compute the nodes at positions ``start`` to ``stop`` (excluded).

        Args:
            values: What is known of the nodes before ``start`` that are still needed.
            inputs: The values of the graph's inputs.
            start: First position.
            stop: Behind the last.
            stand_ins: Site name → its stand-in, on the compressed route.

        Returns:
            What is known of the nodes before ``stop`` that are still needed, inputs left out.
        """
        runner = Interpreter(self._graph_module, garbage_collect_values=False)
        by_name = {node.name: node for node in self._nodes[:start]}
        known: dict[Node, Any] = {by_name[name]: value for name, value in values.items()}
        runner.env = known
        for node in self._nodes:
            if node.op == "placeholder":
                known[node] = inputs[node.name]
        for position in range(start, stop):
            node = self._nodes[position]
            if node not in self._last_use or node.op in ("placeholder", "output"):
                continue
            if node in self._site_of:
                known[node] = self._switch(node, known, stand_ins)
            else:
                known[node] = runner.run_node(node)
            for source in self._sources(node):
                if self._last_use[source] <= position and source.op != "placeholder":
                    known.pop(source, None)
        return {
            node.name: value
            for node, value in known.items()
            if node.op != "placeholder" and self._last_use[node] >= stop
        }

    def _switch(
        self, node: Node, known: Mapping[Node, Any], stand_ins: Mapping[str, StandIn]
    ) -> torch.Tensor:
        (source,) = self._sources(node)
        value: torch.Tensor = known[source]
        if not self._compressed:
            return value
        dense = node.meta["example_value"]
        return stand_ins[self._site_of[node]](value).to(dense.dtype)
