"""Switches: nodes that pass a site's dense output on, or what stands in for it."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from nbl_compiler.passes.graph_tools import example_value

StandIn = Callable[[Tensor], Tensor]
"""What would replace a site: its input [..., d] → its output [..., o]."""


def linear_map(weight: Tensor, bias: Tensor) -> StandIn:
    """Return the stand-in ``x ↦ weight x + bias``, in the dtype of x.

    Args:
        weight: [o, d].
        bias: [o].
    """
    return lambda x: F.linear(x, weight.to(x.device, x.dtype), bias.to(x.device, x.dtype))


def insert_switch(
    graph_module: GraphModule,
    read: Node,
    output: Node,
    stand_in: Callable[[], StandIn | None],
) -> Node:
    """Put a switch behind a site's output and return it.

    Args:
        graph_module: The graph, changed in place.
        read: What the stand-in reads.
        output: The site's output.
        stand_in: Asked at every call: what stands in now, or None for the dense output.
    """

    dense = example_value(output)
    assert isinstance(dense, Tensor)
    dtype = dense.dtype

    def switch(x: Tensor, y: Tensor) -> Tensor:
        other = stand_in()
        return y if other is None else other(x).to(dtype)

    users = list(output.users)
    with graph_module.graph.inserting_after(output):
        node = graph_module.graph.call_function(switch, (read, output))
    node.meta["example_value"] = output.meta.get("example_value")
    for user in users:
        user.replace_input_with(output, node)
    return node
