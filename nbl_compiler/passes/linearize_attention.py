"""Put the plan's linear maps in place of attention (NBL, arXiv 2505.21077, section 3.1).

    before   q, k, v = x Wqᵀ, x Wkᵀ, x Wvᵀ;  rotary;  cache;  y = attention(q, k, v) Woᵀ
    after    y = x Wᵀ + b        x [..., T, d], W [d_out, d], b [d_out], y [..., T, d_out]

x is the hidden state that the projections read (``input="normed"``), or the residual stream in
front of its norm (``input="residual"``); the plan says which it was calibrated for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from nbl_compiler.passes.base import PassReport
from nbl_compiler.passes.graph_tools import example_value
from nbl_compiler.passes.lifting import lift
from nbl_compiler.passes.rewrite_sites import check_dtype, check_shapes, rewrite_sites
from nbl_compiler.passes.sites import AttentionMatch, load_matches, store_linearized
from nbl_compiler.plan import Plan, Site


@dataclass(frozen=True)
class LinearizeAttention:
    """Rewrite every matched attention site that the plan decided to rewrite.

    Raises (when called):
        PlanMismatchError: if a site's map does not have the shape of the site.
        UnsupportedDtypeError: if the model computes in a dtype without a floating matmul here.
    """

    plan: Plan
    name: str = "linearize_attention"

    def __call__(self, graph_module: GraphModule) -> PassReport:
        found = load_matches(graph_module).found
        done, report = rewrite_sites(graph_module, self.plan, "attention", found, rewrite)
        store_linearized(graph_module, done)
        return report


def rewrite(graph_module: GraphModule, match: AttentionMatch, site: Site, plan: Plan) -> Node:
    """Replace one site's output by the plan's map and return the new node."""
    source = match.residual if site.details.get("input") == "residual" else match.hidden
    like, target = example_value(source), example_value(match.output)
    assert isinstance(like, Tensor)
    assert isinstance(target, Tensor)
    check_dtype(site, like)
    width_in, width_out = like.shape[-1], target.shape[-1]
    check_shapes(site, {"weight": (width_out, width_in), "bias": (width_out,)})
    weight = lift(graph_module, f"{site.name}_weight", plan.tensor(site, "weight", like))
    bias = lift(graph_module, f"{site.name}_bias", plan.tensor(site, "bias", like))
    graph = graph_module.graph
    with graph.inserting_after(match.output):
        new = graph.call_function(F.linear, (source, weight, bias))
    if target.dtype != like.dtype:
        with graph.inserting_after(new):
            cast = graph.call_method("to", (new, target.dtype))
        cast.meta.update(match.output.meta)
        new_output = cast
    else:
        new_output = new
    new.meta.update(match.output.meta)
    new.meta["nbl"] = new_output.meta["nbl"] = {"site": site.name, "pass": "linearize_attention"}
    match.output.replace_all_uses_with(new_output)
    return new_output
