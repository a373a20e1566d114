"""The value of every node of a graph."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from nbl_compiler.dumps.failure import copied


class NodeValues(Interpreter):
    """Runs a graph.

    Attributes:
        noted: Nodes' values by their names, as they were when the nodes had run.
        returned: What the graph returned.
    """

    noted: dict[str, Any]
    returned: Any = None
    _wanted: Collection[str] | None = None

    @classmethod
    def on(
        cls,
        graph_module: GraphModule,
        inputs: Sequence[Any],
        wanted: Collection[str] | None = None,
    ) -> NodeValues:
        """Run a graph; the inputs are not changed.

        Args:
            graph_module: The graph.
            inputs: One value per graph input.
            wanted: Names of the nodes whose values are noted; None for all.
        """
        run = cls(graph_module)
        run.noted, run._wanted = {}, wanted
        with torch.no_grad():
            run.returned = run.run(*copied(inputs))
        return run

    def run_node(self, n: Node) -> Any:
        """Run one node."""
        value = super().run_node(n)
        if self._wanted is None or n.name in self._wanted:
            (self.noted[n.name],) = copied([value])
        return value
