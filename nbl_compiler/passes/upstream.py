"""Which weights a plan's maps depend on in one graph."""

from __future__ import annotations

from torch.fx import GraphModule

from nbl_compiler.passes.ffn_sites import FFNMatch, load_folded
from nbl_compiler.passes.graph_tools import is_weight
from nbl_compiler.passes.sites import AttentionMatch, load_linearized


def upstream_weights(graph_module: GraphModule) -> set[str]:
    """Return the names of the weights that feed a rewritten site, its own included.

    A map is right only for the weights it was calibrated on: the region's and all before it. What
    comes after (another head, say) is free.
    """
    names: set[str] = set()
    stack = []
    rewritten: tuple[AttentionMatch | FFNMatch, ...] = (
        *load_linearized(graph_module),
        *load_folded(graph_module),
    )
    for match in rewritten:
        names.update(w.name for w in match.weights)
        stack.append(match.hidden)
    seen = set(stack)
    while stack:
        node = stack.pop()
        if is_weight(node):
            names.add(node.name)
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return names
