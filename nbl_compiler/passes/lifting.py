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
        node = graph.placeholder(_unique(re.sub(r"\W", "_", f"nbl_{name}"), placeholders))
    node.meta["example_value"] = _fake(graph_module, tensor)
    # For CUDA graphs: this input never moves. AOTAutograd asks every input for its source.
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    node._dynamo_source = None
    torch._dynamo.mark_static_address(tensor, guard=False)
    lifted.append((node, tensor))
    return node


def _unique(name: str, placeholders: list[Node]) -> str:
    taken = {str(node.target) for node in placeholders}
    count = 1
    while (numbered := name if count == 1 else f"{name}_{count}") in taken:
        count += 1
    return numbered


def lifted_tensors(graph_module: GraphModule) -> list[Tensor]:
    """Return the tensors behind the lifted inputs, in the order of those inputs."""
    return [tensor for _, tensor in graph_module.meta.get(_LIFTED, [])]


def is_lifted(node: Node) -> bool:
    """Tell whether the node is a lifted input."""
    module = node.graph.owning_module
    return module is not None and any(n is node for n, _ in module.meta.get(_LIFTED, []))


def _fake(graph_module: GraphModule, tensor: Tensor) -> Tensor:
    values = [example_value(n) for n in graph_module.graph.find_nodes(op="placeholder")]
    mode = detect_fake_mode([v for v in values if isinstance(v, Tensor)])
    return tensor if mode is None else mode.from_tensor(tensor, static_shapes=True)
