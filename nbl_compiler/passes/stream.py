"""Where a site's output enters the residual stream."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from nbl_compiler.passes.graph_tools import Topology, is_addition, is_weight, shape_of


@dataclass(frozen=True)
class Entry:
    """How y gets into the stream: s = p(y) + o₁ + o₂ + …

    Args:
        branch: p(y): the output itself, or what norm, scale or dropout makes of it.
        others: The other summands: the residual stream, and the branch beside it in layers that
            compute attention and FFN from one input.
    """

    branch: Node
    others: tuple[Node, ...]


def find_entry(output: Node, topology: Topology) -> Entry | None:
    """Return where a site's output enters the stream, or None if it is not simply added to it.

    Args:
        output: The site's output y.
        topology: Of the graph.
    """
    reached = topology.forward(output)
    shape = shape_of(output)
    in_order = sorted(reached, key=topology.position.__getitem__)
    for node in in_order:
        summands = _summands(node, reached, shape)
        if summands is None:
            continue
        branch, other = summands
        others = [other]
        while len(node.users) == 1:
            (user,) = node.users
            summands = _summands(user, reached, shape)
            if summands is None:
                break
            node = user
            others.append(summands[1])
        return Entry(branch, tuple(others))
    return None


def _summands(node: Node, reached: set[Node], shape: object) -> tuple[Node, Node] | None:
    """Return (what comes from y, what does not) of a sum of two activations."""
    if not is_addition(node) or shape_of(node) != shape:
        return None
    operands = [n for n in node.all_input_nodes if shape_of(n) == shape and not is_weight(n)]
    own = [n for n in operands if n in reached]
    others = [n for n in operands if n not in reached]
    return (own[0], others[0]) if len(own) == len(others) == 1 else None
