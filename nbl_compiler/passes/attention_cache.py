"""How a region uses the KV cache, and whether anything else looks at what it makes.

transformers' caches show up in Dynamo's graphs in these ways::

    keys = torch.cat([past_keys, k], dim=-2)           # dynamic; `keys` is a graph output
    keys = torch.cat([torch.tensor([]), k], dim=-2)    # dynamic, first call
    past_keys.index_copy_(2, positions, k)             # static, in place on a graph input
    keys = torch.zeros(...); keys.index_copy_(...)     # static, first call; `keys` is an output
    new[:, :, i] = k; past_keys.copy_(new)             # static sliding window, full
    nbl.absent_kv(k, length)                           # nbl.cache: nothing is stored,
    nbl.stored_states(past, past_mean, v)              # or only value states
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from nbl_compiler.lowering.value_states import stored_states
from nbl_compiler.passes.graph_tools import (
    Topology,
    argument,
    example_value,
    is_call,
    is_view,
    is_weight,
    is_write,
    shape_of,
    written,
)
from nbl_compiler.passes.hidden_state import Refusal

_FRESH = frozenset({torch.zeros, torch.empty, torch.tensor, torch.zeros_like, torch.empty_like})


@dataclass(frozen=True)
class CacheUse:
    """In-place writes into cache tensors, and concatenations that grow one."""

    writes: tuple[Node, ...] = ()
    appends: tuple[Node, ...] = ()


def cache_use(interior: tuple[Node, ...], output: Node, topology: Topology) -> CacheUse | Refusal:
    """Classify the cache traffic of a region; refuse if anything else leaves it.

    Args:
        interior: The region's nodes without its hidden state and output.
        output: The region's output projection (or the view that restores its shape).
        topology: Of the graph that holds the region.
    """
    inside = {*interior, output}
    writes = {node for node in interior if is_write(node)}
    writes |= _side_writes(interior, inside, topology)
    appends = tuple(node for node in interior if is_append(node))
    allowed = inside | writes
    for write in writes:
        leak = _leak(topology.storage(written(write)), allowed, returned_ok=True)
        if leak is not None:
            return Refusal(leak, f"the cache that `{write.name}` writes is read by `{leak.name}`")
    for node in interior:
        owner = topology.storage(node)
        into_cache = node in writes and owner.op == "placeholder"
        returned_ok = owner in appends or _is_fresh(owner) or into_cache
        leak = _leak(node, allowed, returned_ok)
        if leak is not None:
            return Refusal(
                node, f"the intermediate `{node.name}` is used outside the region by `{leak.name}`"
            )
    return CacheUse(tuple(sorted(writes, key=topology.position.__getitem__)), appends)


def is_append(node: Node) -> bool:
    """Tell whether the node is ``cat([cache, new], dim=-2)`` with a cache tensor in front."""
    if not is_call(node, {torch.cat, torch.concat}):
        return False
    parts = argument(node, 0, "tensors")
    shape, dim = shape_of(node), argument(node, 1, "dim", 0)
    if not isinstance(parts, list | tuple) or len(parts) != 2 or shape is None or len(shape) != 4:
        return False
    front = parts[0]
    return dim in (-2, 2) and isinstance(front, Node) and (_is_state(front) or _is_fresh(front))


def _is_state(node: Node) -> bool:
    """Tell whether the node is (a view of) a non-parameter graph input."""
    while is_view(node) and isinstance(node.args[0], Node):
        node = node.args[0]
    return node.op == "placeholder" and not is_weight(node)


def _is_fresh(node: Node) -> bool:
    return is_call(node, _FRESH)


def _side_writes(interior: tuple[Node, ...], inside: set[Node], topology: Topology) -> set[Node]:
    """Find writes of keys and values that the output does not depend on.

    A full sliding window attends to ``cat(past, new)`` and stores its tail by ``copy_``; the
    written value is a slice of an interior node, and nothing in the region reads it back.
    """
    return {
        user
        for node in interior
        for user in _through_views(node)
        if user not in inside
        and is_write(user)
        and _holds_states(topology.storage(written(user)))
        and topology.storage(written(user)) is not topology.storage(node)
    }


def _holds_states(owner: Node) -> bool:
    """Tell whether a written tensor is a cache: handed in, or made by the first call."""
    return owner.op == "placeholder" or _is_fresh(owner)


def _through_views(node: Node) -> list[Node]:
    reached, stack = [], [node]
    while stack:
        for user in stack.pop().users:
            reached.append(user)
            if is_view(user):
                stack.append(user)
    return reached


def _leak(base: Node, allowed: set[Node], returned_ok: bool) -> Node | None:
    """Return a reader of ``base`` outside ``allowed``, if there is one.

    Views are followed; readers that only ask for a shape do not count, nor does the graph's
    output if ``returned_ok`` (a cache hands its new tensors back that way).
    """
    stack, seen = [base], {base}
    while stack:
        for user in stack.pop().users:
            if user in allowed or user in seen or _reads_shape(user) or _stores_states(user):
                continue
            if user.op == "output":
                if returned_ok:
                    continue
                return user
            if not is_view(user):
                return user
            seen.add(user)
            stack.append(user)
    return None


def _stores_states(node: Node) -> bool:
    """Tell whether the node stands for what a layer of ``nbl.cache`` stores of the values."""
    return is_call(node, {stored_states._opoverload})


def _reads_shape(node: Node) -> bool:
    functions = {getattr, torch.ops.aten.sym_size.int}
    asks = is_call(node, functions, {"size", "numel", "dim", "stride"})
    return asks and not isinstance(example_value(node), torch.Tensor)
