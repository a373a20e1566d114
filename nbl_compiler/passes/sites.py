"""The frozen match objects that flow from the matchers to the rewriting passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from nbl_compiler.passes.base import Rejected
from nbl_compiler.passes.value_path import ValuePath

_MATCHES = "nbl_attention_matches"


@dataclass(frozen=True)
class AttentionMatch:
    """One attention site in one graph.

    Args:
        site: Name of the site, the path of the module that contains the region.
        anchor: The scaled dot-product attention, or the softmax of its eager spelling.
        hidden: The one hidden state x [..., T, d] that all projections read.
        residual: The residual stream [..., T, d] in front of the norm that made ``hidden``;
            ``hidden`` itself where there is no norm.
        output: The output projection's result y [..., T, d_out].
        interior: Every node between ``hidden`` and ``output`` (both excluded), in graph order.
        cache_writes: In-place writes of keys and values into cache tensors.
        cache_appends: Concatenations of a cache tensor with new keys or values.
        weights: The parameters the region reads, in graph order.
        mixed: What attention mixed of the values, [B, heads, T, head size].
        value_path: Where its values are, or why a map cannot read them.
    """

    site: str
    anchor: Node
    hidden: Node
    residual: Node
    output: Node
    interior: tuple[Node, ...]
    cache_writes: tuple[Node, ...]
    cache_appends: tuple[Node, ...]
    weights: tuple[Node, ...]
    mixed: Node
    value_path: ValuePath | str


@dataclass(frozen=True)
class Matches:
    """Everything a matcher found in one graph, in graph order."""

    found: tuple[AttentionMatch, ...] = ()
    rejected: tuple[Rejected, ...] = ()


def store_matches(graph_module: GraphModule, matches: Matches) -> None:
    """Leave the matches on the graph for the passes that follow."""
    graph_module.meta[_MATCHES] = matches


def load_matches(graph_module: GraphModule) -> Matches:
    """Return what the attention matcher left on the graph (nothing, if it did not run)."""
    matches = graph_module.meta.get(_MATCHES, Matches())
    assert isinstance(matches, Matches)
    return matches


def unique_names(names: Sequence[str], fallback: str) -> list[str]:
    """Give every site its own name.

    A module that runs twice (shared layers) gets ``#1``, ``#2`` …; a site without a module path
    is named by its ordinal, ``<fallback>.<i>``.
    """
    result: list[str] = []
    seen: dict[str, int] = {}
    for index, name in enumerate(names):
        base = name or f"{fallback}.{index}"
        repeat = seen.get(base, 0)
        seen[base] = repeat + 1
        result.append(base if repeat == 0 else f"{base}#{repeat}")
    return result


_LINEARIZED = "nbl_linearized_attention"


def store_linearized(graph_module: GraphModule, matches: tuple[AttentionMatch, ...]) -> None:
    """Leave on the graph which sites were linearized, for the cache pass."""
    graph_module.meta[_LINEARIZED] = matches


def load_linearized(graph_module: GraphModule) -> tuple[AttentionMatch, ...]:
    """Return the sites that were linearized in this graph."""
    matches = graph_module.meta.get(_LINEARIZED, ())
    assert isinstance(matches, tuple)
    return matches
