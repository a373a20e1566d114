"""Walking over an FFN's region: from the activation to the down projection, and what lies inside.

z ─ (reshape, cast, dropout) ─ × ─ (reshape, cast, dropout) ─ down
                               │
                             factor
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from nbl_compiler.passes.elementwise import (
    ValueFlow,
    is_product,
    passed_through,
    reads_metadata,
    skip_passes,
)
from nbl_compiler.passes.ffn_sites import Projection, linear_source
from nbl_compiler.passes.graph_tools import (
    Topology,
    example_value,
    is_active_dropout,
    is_call,
    is_view,
    is_weight,
    shape_of,
    skip_views_back,
)
from nbl_compiler.passes.hidden_state import Refusal

_MATRIX_PRODUCTS = frozenset(
    {F.linear, torch.bmm, torch.matmul, torch.baddbmm, torch.einsum, torch.mm, torch.addmm}
)
_MATRIX_METHODS = frozenset({"bmm", "matmul", "baddbmm", "mm"})
_GATHERS = frozenset({torch.index_select, torch.gather})
_SEARCH_LIMIT = 32  # nodes; a decomposed norm has 8


@dataclass(frozen=True)
class Path:
    """Where an activation's value goes.

    Args:
        end: The last node of the walk; the down projection reads it, if there is one.
        product: The multiplication with the other half of a gated FFN, if there is one.
        factor: What it multiplies by.
        down: The linear layer at the end, if there is one.
        refusal: What else makes the path unusable.
    """

    end: Node
    product: Node | None = None
    factor: Node | None = None
    down: Node | None = None
    refusal: Refusal | None = None


def follow(start: Node) -> Path:
    """Follow an activation's value to the first linear layer, or as far as it can be followed."""
    node, product, factor, refusal = start, None, None, None
    while True:
        readers = [user for user in node.users if not reads_metadata(user)]
        onward = [user for user in readers if _leads_on(user, node, product)]
        layers = [user for user in onward if linear_source(user) is node]
        if len(onward) > 1 and layers:
            names = ", ".join(f"`{user.name}`" for user in onward)
            refusal = refusal or Refusal(node, f"the intermediate enters several layers: {names}")
            return Path(node, product, factor, layers[0], refusal)
        if len(onward) != 1:
            return Path(node, product, factor, None, refusal)
        if len(readers) > 1:
            other = next(user for user in readers if user is not onward[0])
            refusal = refusal or used_outside(node, other)
        if layers:
            return Path(node, product, factor, layers[0], refusal)
        if is_active_dropout(onward[0]):
            refusal = refusal or Refusal(onward[0], "dropout is active; call model.eval() first")
        elif passed_through(onward[0]) is None:
            product = onward[0]
            factor = next(n for n in product.all_input_nodes if n is not node)
        node = onward[0]


def used_outside(node: Node, reader: Node) -> Refusal:
    """Refuse because ``reader``, outside the region, reads ``node``."""
    return Refusal(
        node, f"the intermediate `{node.name}` is used outside the region by `{reader.name}`"
    )


def _leads_on(user: Node, node: Node, product: Node | None) -> bool:
    """Tell whether a walk may go from ``node`` to its reader ``user``."""
    if linear_source(user) is node or passed_through(user) is node:
        return True
    if is_active_dropout(user):
        return user.args[0] is node
    if product is not None or not is_product(user):
        return False
    factors = user.all_input_nodes
    same = len({shape_of(n) for n in (user, *factors)}) == 1
    return len(factors) == 2 and same and not any(is_weight(n) for n in factors)


def layers_beyond(end: Node, flow: ValueFlow) -> list[Node]:
    """Return the linear layers that the value reaches through other calls, a norm say.

    Only calls that depend on nothing but the value (and on weights) are looked through, so the
    search stays off the residual stream.
    """
    inside, layers = {end}, []
    for node in flow.following(inside):
        if linear_source(node) in inside:
            layers.append(node)
        elif len(inside) < _SEARCH_LIMIT and all(n in inside for n in flow.inputs(node)):
            inside.add(node)
    return layers


def is_expert_product(node: Node) -> bool:
    """Tell whether the node multiplies by the stacked weights of several experts."""
    if "grouped_mm" in str(node.target):
        return True
    if not is_call(node, _MATRIX_PRODUCTS, _MATRIX_METHODS):
        return False
    return any(len(_stored_shape(n)) >= 3 for n in node.all_input_nodes)


def reaches_experts(end: Node, flow: ValueFlow) -> bool:
    """Tell whether the value enters a product with experts' weights, through any calls."""
    inside = {end}
    for node in flow.following(inside):
        if is_expert_product(node):
            return True
        if len(inside) < _SEARCH_LIMIT and all(n in inside for n in flow.inputs(node)):
            inside.add(node)
    return False


def _stored_shape(node: Node) -> tuple[object, ...]:
    """Return the shape of the parameter that the node looks into; () if it does not."""
    while is_view(node) and isinstance(node.args[0], Node):
        node = node.args[0]
    return shape_of(node) or () if is_weight(node) else ()


def selects_tokens(hidden: Node) -> bool:
    """Tell whether a hidden state holds tokens that were picked by computed indices."""
    node = skip_passes(hidden)
    if is_call(node, _GATHERS, {"index_select", "gather"}):
        return True
    indices = node.all_input_nodes[1:] if is_call(node, {operator.getitem}) else []
    return any(isinstance(example_value(index), Tensor) for index in indices)


def matching_ends(projections: list[Projection], output: Node) -> tuple[Node, Node] | Refusal:
    """Return (hidden, output) with the same leading dimensions.

    Behind reshapes (``Conv1D`` flattens its input and restores the shape of its output) the
    hidden state and the output may be any of several nodes; the outermost pair is taken.
    """
    chains = [_flattenings(projection.source) for projection in projections]
    if chains[0][0] is not chains[-1][0]:
        names = ", ".join(f"`{chain[0].name}`" for chain in chains)
        return Refusal(chains[-1][0], f"gate and up read different hidden states: {names}")
    outputs = [output]
    while (restored := _restored(outputs[-1])) is not None:
        outputs.append(restored)
    for hidden in chains[0]:
        for node in outputs:
            shape, given = shape_of(node), shape_of(hidden)
            if hidden in chains[-1] and shape and given and shape[:-1] == given[:-1]:
                return hidden, node
    shapes = f"{shape_of(output)} does not follow input {shape_of(chains[0][0])}"
    return Refusal(output, f"output of shape {shapes}")


def _flattenings(source: Node) -> list[Node]:
    """Return the hidden state behind ``source``, and the reshapes from there to ``source``."""
    base = skip_views_back(source)
    chain = [source]
    while chain[-1] is not base:
        before = chain[-1].args[0]
        assert isinstance(before, Node)
        chain.append(before)
    return chain[::-1]


def _restored(node: Node) -> Node | None:
    """Return the reshape of ``node`` that is its only reader, if it has one."""
    readers = [user for user in node.users if not reads_metadata(user)]
    alone = len(readers) == 1 and passed_through(readers[0]) is node
    return readers[0] if alone and skip_views_back(readers[0]) is not readers[0] else None


def interior_of(hidden: Node, output: Node, flow: ValueFlow) -> tuple[Node, ...]:
    """Return the nodes that depend on ``hidden`` and that ``output`` depends on, in graph order."""
    cone, stack = {output}, [output]
    while stack:
        for source in flow.inputs(stack.pop()):
            if source is not hidden and source not in cone:
                cone.add(source)
                stack.append(source)
    dependent = {hidden}
    for node in sorted(cone, key=flow.position.__getitem__):
        if any(source in dependent for source in flow.inputs(node)):
            dependent.add(node)
    return tuple(sorted(dependent - {hidden, output}, key=flow.position.__getitem__))


def find_overwrite(
    hidden: Node, interior: tuple[Node, ...], output: Node, topology: Topology
) -> Refusal | None:
    """Refuse if the hidden state is written in place while the region reads it."""
    start, end = topology.position[interior[0]], topology.position[output]
    for write in topology.writers.get(topology.storage(hidden), ()):
        if start < topology.position[write] < end:
            reason = f"more than one hidden input: `{write.name}` overwrites the first"
            return Refusal(write, reason)
    return None


def find_leak(interior: tuple[Node, ...], output: Node) -> Refusal | None:
    """Refuse if anything outside the region reads one of its intermediates."""
    inside = {*interior, output}
    for node in interior:
        for user in node.users:
            if user not in inside and not reads_metadata(user):
                return used_outside(node, user)
    return None
