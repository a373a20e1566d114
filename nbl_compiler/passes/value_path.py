"""Where a site's values are in the graph, and how many positions each token attends to.

From the anchor's value operand the walk goes back over views and head repetition to the newest of::

    values = cat([past, v], -2)              dynamic cache: the new values are the last rows
    past.index_copy_(2, positions, v)        static cache: they are the rows at ``positions``
    new = past.roll(-1); new[:, :, i] = v    static cache, full window: the last row
    absent_kv(v, length)                     nbl.cache, which keeps no values
    v                                        no cache: they are all rows there are
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from nbl_compiler.lowering.absent_kv import absent_kv
from nbl_compiler.passes.attention_cache import is_append
from nbl_compiler.passes.graph_tools import (
    Topology,
    argument,
    is_addition,
    is_call,
    is_floating,
    is_view,
    is_weight,
    projection_input,
    shape_of,
    skip_views_back,
    weight_behind,
)

_REPEATS = frozenset({torch.repeat_interleave})
_ROLLS = frozenset({torch.roll})


@dataclass(frozen=True)
class ValuePath:
    """What value states are made of.

    Args:
        new: The values of this call, [B, H, T, D].
        rows: All values in reach, [B, H, R, D], new ones included; ``new`` itself without a cache.
        positions: Where the new ones are among the rows, [T]; None if they are the last.
        stand_in: The ``nbl::absent_kv`` of a cache from ``nbl.cache``, in place of rows.
        mask: The attention mask [B, H, T, K] or [T, K], if there is one.
        first: Without a mask: whether the call is the first, its tokens attending to one another;
            otherwise it is a single token, which attends to everything.
    """

    new: Node
    rows: Node
    positions: Node | None = None
    stand_in: Node | None = None
    mask: Node | None = None
    first: bool = False


def find_value_path(
    hidden: Node, operands: Mapping[str, Node], mixed: Node, topology: Topology
) -> ValuePath | str:
    """Return the value path of a site, or why its map cannot read values.

    Args:
        hidden: The hidden state of the site.
        operands: ``"query"``, ``"key"`` and ``"value"``, and of the eager spelling ``"scores"``.
        mixed: The node that holds the mixed values.
        topology: Of the graph.
    """
    path = _rows(operands["value"], hidden, topology)
    if path is None:
        return "its values cannot be told from the graph, or are projected in several steps"
    if "scores" in operands:
        mask, causal = _added_mask(operands["scores"], operands["query"], topology), False
    else:
        given = argument(mixed, 3, "attn_mask")
        mask = given if isinstance(given, Node) else None
        causal = bool(argument(mixed, 5, "is_causal", False))
    if mask is None and not causal and not _single_token(path.new):
        return "its attention is not causal, or its mask cannot be told from the graph"
    if mask is not None and len(shape_of(mask) or ()) not in (2, 4):
        return "its mask has a form that is not known"
    return replace(path, mask=mask, first=causal)


def _single_token(node: Node) -> bool:
    shape = shape_of(node)
    return shape is not None and shape[2] == 1


def _rows(operand: Node, hidden: Node, topology: Topology) -> ValuePath | None:
    """Walk back from the values that are mixed to what was stored, or would be."""
    node, best = operand, None
    seen: set[Node] = set()
    while node not in seen:
        seen.add(node)
        found = _at_cache(node, topology)
        if found is not None:
            return found if len(shape_of(found.new) or ()) == 4 else None
        source = projection_input(node)
        if source is not None:
            if skip_views_back(source) is not skip_views_back(hidden):
                return None  # a latent's (MLA), which is what its cache holds
            break
        if _repeats_heads(node):
            best = None
        elif best is None and len(shape_of(node) or ()) == 4:
            best = node
        origin = argument(node, 0, "input")
        rearranges = is_view(node) or _repeats_heads(node) or is_call(node, (), {"clone"})
        if not rearranges or not isinstance(origin, Node):
            break
        node = origin
    return None if best is None else ValuePath(best, best)


def _repeats_heads(node: Node) -> bool:
    if is_call(node, _REPEATS, {"repeat_interleave", "repeat"}):
        return True
    shape = shape_of(node)
    return is_call(node, (), {"expand"}) and shape is not None and len(shape) == 5


def _at_cache(node: Node, topology: Topology) -> ValuePath | None:
    """Return where the rows of a node are that reads or grows a cache, if it is one."""
    if is_call(node, {absent_kv._opoverload}):
        new = node.args[0]
        return ValuePath(new, new, stand_in=node) if isinstance(new, Node) else None
    if is_append(node):
        parts = argument(node, 0, "tensors")
        assert isinstance(parts, list | tuple)
        assert isinstance(parts[1], Node)
        return ValuePath(parts[1], node)
    owner = topology.storage(node)
    for write in topology.writers.get(owner, ()):
        found = _written_rows(write, owner, topology)
        if found is not None:
            return found
    return None


def _written_rows(write: Node, owner: Node, topology: Topology) -> ValuePath | None:
    """Return the rows that a write puts into a cache: by position, or into a rolled copy."""
    if is_call(write, (), {"index_copy_"}):
        positions, new = write.args[2], write.args[3]
        if isinstance(positions, Node) and isinstance(new, Node):
            return ValuePath(new, owner, positions)
    if not is_call(write, (), {"copy_"}) or not isinstance(write.args[1], Node):
        return None
    rolled = topology.storage(write.args[1])
    if not is_call(rolled, _ROLLS, {"roll"}):
        return None
    for inner in topology.writers.get(rolled, ()):
        new = inner.args[-1]
        if inner is not write and isinstance(new, Node):
            return ValuePath(new, owner)
    return None


def _added_mask(scores: Node, query: Node, topology: Topology) -> Node | None:
    """Return what the eager spelling adds to the scores that does not depend on the queries."""
    node: object = scores
    reached = topology.forward(query)
    while isinstance(node, Node) and projection_input(node) is None:
        inputs = [n for n in node.all_input_nodes if is_floating(n) and not is_weight(n)]
        from_scores = [n for n in inputs if n in reached]
        others = [n for n in inputs if n not in reached and len(shape_of(n) or ()) == 4]
        if is_addition(node) and len(from_scores) == len(others) == 1 and _is_mask(others[0], node):
            return others[0]
        if len(from_scores) != 1:
            return None
        node = from_scores[0]
    return None


def _is_mask(node: Node, scores: Node) -> bool:
    """Tell whether a tensor has a column a key and a row a query: position biases may not."""
    shape, wanted = shape_of(node), shape_of(scores)
    return shape is not None and wanted is not None and shape[-2:] == wanted[-2:]


def value_weights(path: ValuePath, hidden: Node, topology: Topology) -> list[Node]:
    """Return the parameters that the new values are computed with, in graph order."""
    cone = topology.backward(path.new, stop=lambda node: node is hidden)
    read = (source for node in cone if node is not hidden for source in node.all_input_nodes)
    found = {weight for node in read if (weight := weight_behind(node)) is not None}
    return sorted(found, key=topology.position.__getitem__)
