"""Erase the keys and values of linearized sites.

Dead-code elimination keeps in-place writes, and a dynamic cache's tensors are graph outputs; so
both are taken out on purpose::

    before   past_keys.index_copy_(2, positions, k)         after  (nothing)
    before   keys = cat([past_keys, k], -2); return keys    after  keys = zeros().expand(B, H, L, D)

A site whose map reads value states keeps the updates of its values (``linearize_attention``).
The matcher has shown that nothing outside the region reads them. Lengths stay right: a static
layer's counter is another tensor, and a dynamic layer's length is the shape of ``keys``, which is
kept (with one stored element: the expanded dimensions have stride 0).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import Tensor
from torch.fx import GraphModule, Node

from nbl_compiler.passes.base import PassReport
from nbl_compiler.passes.graph_tools import argument, example_value, written
from nbl_compiler.passes.sites import AttentionMatch, load_linearized


@dataclass(frozen=True)
class DropCacheUpdates:
    """Remove cache writes and appends inside linearized regions."""

    name: str = "drop_cache_updates"

    def __call__(self, graph_module: GraphModule) -> PassReport:
        linearized = load_linearized(graph_module)
        touched = [m.site for m in linearized if m.cache_writes or m.cache_appends]
        for match in linearized:
            for append in match.cache_appends:
                _keep_length_only(graph_module, match, append)
            for write in reversed(match.cache_writes):
                write.replace_all_uses_with(written(write))
                graph_module.graph.erase_node(write)
        return PassReport(rewritten=tuple(touched))


def _keep_length_only(graph_module: GraphModule, match: AttentionMatch, append: Node) -> None:
    """Put a tensor of the same shape, with one stored element, in place of grown keys or values."""
    value = example_value(append)
    parts = argument(append, 0, "tensors")
    assert isinstance(value, Tensor)
    assert isinstance(parts, list | tuple)
    front = parts[0]
    assert isinstance(front, Node)
    past = example_value(front)
    graph, hidden = graph_module.graph, match.hidden
    with graph.inserting_before(append):
        sizes: list[int | Node] = []
        for dim, size in enumerate(value.shape):
            if isinstance(size, int):
                sizes.append(size)
            elif dim == 0:
                sizes.append(graph.call_method("size", (hidden, 0)))
            else:
                length = graph.call_method("size", (hidden, -2))
                if isinstance(past, Tensor) and past.ndim == value.ndim:
                    before = graph.call_method("size", (front, dim))
                    length = graph.call_function(operator.add, (before, length))
                sizes.append(length)
        one = graph.call_method("new_zeros", (hidden, (1,) * value.ndim), {"dtype": value.dtype})
        empty = graph.call_method("expand", (one, *sizes))
    empty.meta.update(append.meta)
    empty.meta["nbl"] = {"site": match.site, "pass": "drop_cache_updates"}
    append.replace_all_uses_with(empty)
    graph.erase_node(append)
