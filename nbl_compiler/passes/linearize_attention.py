"""Put the plan's linear maps in place of attention (NBL, arXiv 2505.21077, section 3.1).

    before   q, k, v = x Wqᵀ, x Wkᵀ, x Wvᵀ;  rotary;  cache;  y = attention(q, k, v) Woᵀ
    after    y = x Wᵀ + b        x [..., T, d], W [d_out, d], b [d_out], y [..., T, d_out]

x is the hidden state that the projections read (``input="normed"``), or the residual stream in
front of its norm (``input="residual"``); the plan says which it was calibrated for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from nbl_compiler.errors import PlanMismatchError, UnsupportedDtypeError
from nbl_compiler.passes.base import PassReport, Rejected, source_line
from nbl_compiler.passes.graph_tools import example_value
from nbl_compiler.passes.lifting import lift
from nbl_compiler.passes.site_lookup import find_site
from nbl_compiler.passes.sites import AttentionMatch, load_matches, store_linearized
from nbl_compiler.plan import Plan, Site

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
        done: list[AttentionMatch] = []
        left: list[Rejected] = []
        for match in load_matches(graph_module).found:
            site = find_site(self.plan, match)
            match = match if site is None else replace(match, site=site.name)
            if site is not None and site.decision == "rewritten":
                rewrite(graph_module, match, site, self.plan)
                done.append(match)
                continue
            reason = "the plan does not know this site" if site is None else site.reason
            left.append(
                Rejected(
                    match.site, "attention", match.anchor.name, reason, source_line(match.anchor)
                )
            )
        store_linearized(graph_module, tuple(done))
        return PassReport(rewritten=tuple(m.site for m in done), rejected=tuple(left))


def rewrite(graph_module: GraphModule, match: AttentionMatch, site: Site, plan: Plan) -> Node:
    """Replace one site's output by the plan's map and return the new node."""
    source = match.residual if site.details.get("input") == "residual" else match.hidden
    like, target = example_value(source), example_value(match.output)
    assert isinstance(like, Tensor)
    assert isinstance(target, Tensor)
    _check(site, like, target)
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


def _check(site: Site, source: Tensor, output: Tensor) -> None:
    if source.dtype not in SUPPORTED_DTYPES:
        raise UnsupportedDtypeError(
            f"{site.name} computes in {source.dtype}; supported are "
            + ", ".join(str(d).removeprefix("torch.") for d in SUPPORTED_DTYPES)
        )
    wanted = {"weight": (output.shape[-1], source.shape[-1]), "bias": (output.shape[-1],)}
    for key, shape in wanted.items():
        found = tuple(site.tensors[key].shape) if key in site.tensors else None
        if found != shape:
            raise PlanMismatchError(
                f"the plan's {key} for {site.name} has shape {found}, the model needs {shape}; "
                "calibrate this model"
            )
