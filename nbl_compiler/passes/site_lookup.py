"""Which site of a plan a match is.

Usually the name says it. Behind a graph break, though, Dynamo may compile one decoder layer as a
graph of its own, and every layer's attention is then called ``self_attn``; an encoder compiled
alone has the same paths as the decoder. There the weights that the region reads decide.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from nbl_compiler.fingerprint import find_stranger
from nbl_compiler.passes.ffn_sites import FFNMatch
from nbl_compiler.passes.ffn_weights import parameter_value
from nbl_compiler.passes.sites import AttentionMatch
from nbl_compiler.plans import Kind, Plan, Site


def find_site(plan: Plan, match: AttentionMatch | FFNMatch, kind: Kind) -> Site | None:
    """Return the plan's site for a match: by its name or else its weights, or None."""
    return plan.find(match.site, kind) or _find_by_weights(plan, match.weights, kind)


def _find_by_weights(plan: Plan, nodes: Sequence[Node], kind: Kind) -> Site | None:
    """Return the one site that was calibrated on the weights this region reads."""
    values = {node.name: parameter_value(node) for node in nodes}
    weights = {name: value for name, value in values.items() if value is not None}
    if not weights:
        return None
    same = []
    for site in plan.sites:
        known = [plan.fingerprint[i] for i in site.details.get("weights", ())]
        if site.kind == kind and known and find_stranger(weights, known) is None:
            same.append(site)
    return same[0] if len(same) == 1 else None
