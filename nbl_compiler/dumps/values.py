"""The value of every node of a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from nbl_compiler.dumps.failure import copied


class NodeValues(Interpreter):
    """Runs a graph.

    Attributes:
        noted: Every node's value by its name, as it was when the node had run.
        returned: What the graph returned.
    """

    noted: dict[str, Any]
    returned: Any = None

    @classmethod
    def on(cls, graph_module: GraphModule, inputs: Sequence[Any]) -> NodeValues:
        """Run a graph; the inputs are not changed."""
        run = cls(graph_module)
        run.noted = {}
        with torch.no_grad():
            run.returned = run.run(*copied(inputs))
        return run

    def run_node(self, n: Node) -> Any:
        """Run one node."""
        value = super().run_node(n)
        (self.noted[n.name],) = copied([value])
        return value
