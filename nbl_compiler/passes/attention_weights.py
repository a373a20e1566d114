"""Adding a node that sees how a site's attention divides its weight over the buckets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from nbl_compiler.lowering.mixed_values import bucket_masses
from nbl_compiler.passes.emit_states import emit_count
from nbl_compiler.passes.graph_tools import argument, is_call
from nbl_compiler.passes.sites import AttentionMatch

QUERIES_AT_ONCE = 256
"""The weights of all keys for more would fill the memory behind long rows."""

See = Callable[[Tensor, Tensor, Tensor], None]
"""(x [..., d], weights of buckets [B, T, heads, 1 + buckets], n_t [B or 1, T]) → nothing."""


def insert_view_of_weights(graph_module: GraphModule, match: AttentionMatch, see: See) -> None:
    """Call ``see`` with what a site's attention does, each time that the graph runs.

    Args:
        graph_module: The graph, changed in place; it runs as it is.
        match: A site with a value path.
        see: Called with the site's hidden state, too.
    """
    assert not isinstance(match.value_path, str)
    count = emit_count(graph_module, match)
    new = match.value_path.new
    graph = graph_module.graph
    if is_call(match.anchor, _SDPA):
        names = ((0, "query"), (1, "key"), (3, "attn_mask"), (5, "is_causal"), (6, "scale"))
        query, key, mask, causal, given_scale = (argument(match.anchor, *n) for n in names)
        scale = float(given_scale) if isinstance(given_scale, int | float) else None

        def of_sdpa(x: Tensor, count: Tensor, query: Tensor, key: Tensor, mask: Any) -> None:
            see(x, _masses(query, key, mask, bool(causal), scale, count), count)

        given: tuple[Any, ...] = (match.hidden, count, query, key, mask)
        target: Callable[..., None] = of_sdpa
    else:

        def of_probabilities(x: Tensor, count: Tensor, weights: Tensor, new: Tensor) -> None:
            length = new.shape[2]
            weights = weights.reshape(new.shape[0], -1, length, weights.shape[-1])
            see(x, bucket_masses(weights, count), count)

        given, target = (match.hidden, count, match.anchor, new), of_probabilities
    with graph.inserting_after(match.output):
        graph.call_function(target, given)


def has_plain_scale(match: AttentionMatch) -> bool:
    """Tell whether the weights can be computed anew: the scale is a number, or the usual one."""
    return not isinstance(argument(match.anchor, 6, "scale"), Node)


def _masses(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    count: Tensor,
) -> Tensor:
    """Return the weights of buckets, a few queries at a time."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    length, columns = query.shape[2], key.shape[2]
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    parts = []
    for start in range(0, length, QUERIES_AT_ONCE):
        stop = min(start + QUERIES_AT_ONCE, length)
        seen = columns - length + stop  # causal: no later key has weight
        scores = (query[:, :, start:stop] * factor) @ key[:, :, :seen].transpose(2, 3)
        scores = scores.float()
        if mask is not None:
            part = mask[..., start:stop, :seen] if mask.shape[-2] > 1 else mask[..., :seen]
            if part.dtype == torch.bool:
                scores = scores.masked_fill(~part, torch.finfo(scores.dtype).min)
            else:
                scores = scores + part
        elif causal:
            own = torch.arange(seen - (stop - start), seen, device=scores.device)
            later = torch.arange(seen, device=scores.device) > own[:, None]
            scores = scores.masked_fill(later, torch.finfo(scores.dtype).min)
        some = count[:, start:stop] if count.shape[1] > 1 else count
        parts.append(bucket_masses(scores.softmax(-1), some))
    return torch.cat(parts, 1)


_SDPA = frozenset({F.scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention})
