"""Anchors of attention: where a graph mixes tokens, and the operands of the mixing.

Two spellings are found::

    F.scaled_dot_product_attention(q, k, v, mask)               # SDPA
    (softmax(q @ kᵀ * scale + mask)) @ v                        # eager
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from nbl_compiler.passes.graph_tools import (
    Topology,
    argument,
    is_call,
    is_floating,
    is_weight,
    module_path,
    projection_input,
)
from nbl_compiler.passes.hidden_state import ends_walk

_SDPA = frozenset({F.scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention})
_SOFTMAX = frozenset({torch.softmax, F.softmax, torch.special.softmax})
_PRODUCTS = frozenset({torch.matmul, torch.bmm, operator.matmul})
_PRODUCT_METHODS = frozenset({"matmul", "bmm", "baddbmm"})
_BIASED_PRODUCTS = frozenset({torch.baddbmm})
_OPAQUE = ("flex_attention", "flash_attn", "_flash_attention", "xformers", "paged_attention")


@dataclass(frozen=True)
class Anchor:
    """One place where tokens are mixed.

    Args:
        node: The node that names the anchor in reasons.
        operands: What the mixing reads: name → node. Query, key and value; for SDPA a mask that
            is projected from activations, for the eager spelling the softmax's input ("scores").
        result: The node that holds the mixed values.
        dropout: Dropout probability that is active inside the anchor itself.
    """

    node: Node
    operands: dict[str, Node]
    result: Node
    dropout: float = 0.0


def find_anchors(graph_module: GraphModule, topology: Topology) -> list[Anchor]:
    """Return every anchor in graph order."""
    anchors = []
    for node in graph_module.graph.nodes:
        anchor = _sdpa_anchor(node, topology) or _eager_anchor(node, topology)
        if anchor is not None:
            anchors.append(anchor)
    return anchors


def find_opaque(graph_module: GraphModule) -> list[Node]:
    """Return attention kernels that hide their operands from the matcher."""
    return [
        node
        for node in graph_module.graph.nodes
        if node.op == "call_function"
        and any(name in str(node.target) for name in _OPAQUE)
        and module_path(node)
    ]


def _sdpa_anchor(node: Node, topology: Topology) -> Anchor | None:
    if not is_call(node, _SDPA):
        return None
    named = {
        "query": argument(node, 0, "query"),
        "key": argument(node, 1, "key"),
        "value": argument(node, 2, "value"),
    }
    operands = {name: value for name, value in named.items() if isinstance(value, Node)}
    mask = argument(node, 3, "attn_mask")
    if isinstance(mask, Node) and _is_projected(mask, topology):
        operands["mask"] = mask
    dropout = argument(node, 4, "dropout_p", 0.0)
    return Anchor(node, operands, node, dropout if isinstance(dropout, int | float) else 1.0)


def _is_projection(node: Node) -> bool:
    return projection_input(node) is not None


def _is_projected(mask: Node, topology: Topology) -> bool:
    """Tell whether a mask's values come from a projection (its sizes may, in any mask)."""
    return any(map(_is_projection, topology.backward(mask, stop=ends_walk)))


def _is_product(node: Node) -> bool:
    """Tell whether the node multiplies two activations."""
    if _is_projection(node) or any(is_weight(source) for source in node.all_input_nodes):
        return False
    if is_call(node, {torch.einsum}):
        return len(node.all_input_nodes) == 2
    return is_call(node, _PRODUCTS | _BIASED_PRODUCTS, _PRODUCT_METHODS)


def _eager_anchor(node: Node, topology: Topology) -> Anchor | None:
    if not is_call(node, _SOFTMAX, {"softmax"}):
        return None
    scores = argument(node, 0, "input")
    if not isinstance(scores, Node):
        return None
    product = _following_product(node)
    if product is None:
        return None
    mixed, weights = product
    value = next((n for n in mixed.all_input_nodes if n is not weights), None)
    behind = topology.backward(scores, stop=lambda n: _is_product(n) or ends_walk(n))
    products = [scores] if _is_product(scores) else [n for n in behind if _is_product(n)]
    if value is None or not products:
        return None
    last = products[-1]  # masks and positions are made before
    factors = [source for source in last.all_input_nodes if is_floating(source)]
    operands = {"query": factors[-2:][0], "key": factors[-1], "value": value, "scores": scores}
    return Anchor(node, operands, mixed)


def _following_product(softmax: Node) -> tuple[Node, Node] | None:
    """Return (product, its operand that comes from the softmax), if one follows."""
    seen = {softmax}
    stack = [softmax]
    while stack:
        node = stack.pop()
        for user in node.users:
            if _is_product(user):
                return user, node
            if user.op in ("call_function", "call_method") and user not in seen:
                seen.add(user)
                if len(seen) > 12:  # attention weights reach the values within a few casts
                    return None
                stack.append(user)
    return None
