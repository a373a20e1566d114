"""Which site of a plan a match is.

Usually the name says it. Behind a graph break, though, Dynamo may compile one decoder layer as a
graph of its own, and every layer's attention is then called ``self_attn``; an encoder compiled
alone has the same paths as the decoder. There the weights that the region reads decide.
"""

from __future__ import annotations

from torch import nn
from torch.fx import Node

from nbl_compiler.fingerprint import find_stranger
from nbl_compiler.passes.sites import AttentionMatch
from nbl_compiler.plan import Plan, Site


def find_site(plan: Plan, match: AttentionMatch) -> Site | None:
    """Return the plan's site for a match: by its name, else by its weights, else None."""
    return plan.find(match.site, "attention") or _find_by_weights(plan, match)


def _find_by_weights(plan: Plan, match: AttentionMatch) -> Site | None:
    """Return the one site that was calibrated on the weights this region reads."""
    values = {node.name: weight_value(node) for node in match.weights}
    weights = {name: value for name, value in values.items() if value is not None}
    if not weights:
        return None
    same = []
    for site in plan.sites:
        known = [plan.fingerprint[i] for i in site.details.get("weights", ())]
        if site.kind == "attention" and known and find_stranger(weights, known) is None:
            same.append(site)
    return same[0] if len(same) == 1 else None


def weight_value(node: Node) -> nn.Parameter | None:
    """Return the parameter behind a graph input, as Dynamo knows it while it compiles."""
    argument = node.meta.get("grapharg")
    value = None if argument is None else argument.example
    return value if isinstance(value, nn.Parameter) else None
