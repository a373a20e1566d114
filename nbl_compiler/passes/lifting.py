"""Bringing a plan's tensors into a graph.

Since torch 2.11 Dynamo passes parameters as graph *inputs*; a buffer added to the GraphModule makes
AOTAutograd fail, because it has no Dynamo source. So the tensors become further inputs, appended
behind Dynamo's own, and the backend closes over their values (``nbl_compiler.backend``).
"""

from __future__ import annotations

import re

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.fx import GraphModule, Node

from nbl_compiler.passes.graph_tools import example_value

_LIFTED = "nbl_lifted"


def lift(graph_module: GraphModule, name: str, tensor: Tensor) -> Node:
    """Add a graph input that will always hold ``tensor``; the same tensor is added once."""
    lifted: list[tuple[Node, Tensor]] = graph_module.meta.setdefault(_LIFTED, [])
    for node, known in lifted:
        if known is tensor:
            return node
    graph = graph_module.graph
    placeholders = graph.find_nodes(op="placeholder")
    first = next(iter(graph.nodes))
    with graph.inserting_after(placeholders[-1]) if placeholders else graph.inserting_before(first):
        node = graph.placeholder(re.sub(r"\W", "_", f"nbl_{name}"))
    node.meta["example_value"] = _fake(graph_module, tensor)
    # For CUDA graphs: this input never moves. AOTAutograd asks every input for its source.
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    node._dynamo_source = None
    torch._dynamo.mark_static_address(tensor, guard=False)
    lifted.append((node, tensor))
    return node


def lifted_tensors(graph_module: GraphModule) -> list[Tensor]:
    """Return the tensors behind the lifted inputs, in the order of those inputs."""
    return [tensor for _, tensor in graph_module.meta.get(_LIFTED, [])]


def _fake(graph_module: GraphModule, tensor: Tensor) -> Tensor:
    values = [example_value(n) for n in graph_module.graph.find_nodes(op="placeholder")]
    mode = detect_fake_mode([v for v in values if isinstance(v, Tensor)])
    return tensor if mode is None else mode.from_tensor(tensor, static_shapes=True)
