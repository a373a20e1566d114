"""A copy of Dynamo's graph that may be changed.

Dynamo goes on reading its own graph after the backend returns (guards, inputs), so new inputs must
not appear there.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, GraphModule, Node


def private_copy(graph_module: GraphModule) -> GraphModule:
    """Return a GraphModule with its own graph and Dynamo's metadata; modules are shared."""
    graph = Graph()
    copies: dict[Node, Node] = {}
    result: Any = graph.graph_copy(graph_module.graph, copies, return_output_node=True)
    if result is not None:  # (value, original output node)
        value, original = result
        output = graph.output(value)
        output.meta = dict(original.meta)
    for original, copy in copies.items():
        if hasattr(original, "_dynamo_source"):
            copy._dynamo_source = original._dynamo_source
    new = GraphModule(graph_module, graph)
    new.meta = dict(graph_module.meta)
    if hasattr(graph_module, "_param_name_to_source"):
        new._param_name_to_source = graph_module._param_name_to_source
    return new
