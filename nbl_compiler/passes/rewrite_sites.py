"""What the rewriting passes share: going through the sites, and checks that come before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from nbl_compiler.errors import PlanMismatchError, UnsupportedDtypeError
from nbl_compiler.passes.base import PassReport, Rejected, source_line
from nbl_compiler.passes.ffn_sites import FFNMatch
from nbl_compiler.passes.site_lookup import find_site
from nbl_compiler.passes.sites import AttentionMatch
from nbl_compiler.plans import Kind, Plan, Site

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

Match = TypeVar("Match", AttentionMatch, FFNMatch)


def rewrite_sites(
    graph_module: GraphModule,
    plan: Plan,
    kind: Kind,
    found: Sequence[Match],
    rewrite: Callable[[GraphModule, Match, Site, Plan], object],
    leave: Callable[[Match, Site], str | None] = lambda *_: None,
) -> tuple[tuple[Match, ...], PassReport]:
    """Rewrite every matched site that the plan decided to rewrite.

    Args:
        graph_module: The graph, changed in place.
        plan: The plan.
        kind: Of the sites.
        found: The matches.
        rewrite: Puts the plan's tensors in place of one site.
        leave: Says why this graph leaves a site dense that the plan rewrites, if it does.

    Returns:
        What was rewritten, under the plan's names, and the pass's report.
    """
    done: list[Match] = []
    left: list[Rejected] = []
    for match in found:
        site = find_site(plan, match, kind)
        match = match if site is None else replace(match, site=site.name)
        if site is None:
            reason = "the plan does not know this site"
        elif site.decision != "rewritten":
            reason = site.reason
        else:
            here = leave(match, site)
            if here is None:
                rewrite(graph_module, match, site, plan)
                done.append(match)
                continue
            reason = here
        anchor = match.anchor
        left.append(Rejected(match.site, kind, anchor.name, reason, source_line(anchor)))
    return tuple(done), PassReport(rewritten=tuple(m.site for m in done), rejected=tuple(left))


def check_dtype(site: Site, source: Tensor) -> None:
    """Raise ``UnsupportedDtypeError`` if the site computes in a dtype without a matmul here."""
    if source.dtype not in SUPPORTED_DTYPES:
        raise UnsupportedDtypeError(
            f"{site.name} computes in {source.dtype}; supported are "
            + ", ".join(str(d).removeprefix("torch.") for d in SUPPORTED_DTYPES)
        )


def check_shapes(site: Site, wanted: Mapping[str, tuple[object, ...]]) -> None:
    """Raise ``PlanMismatchError`` if a tensor of the site is missing or has another shape."""
    for name, shape in wanted.items():
        found = tuple(site.tensors[name].shape) if name in site.tensors else None
        if found != shape:
            raise PlanMismatchError(
                f"the plan's {name} for {site.name} has shape {found}, the model needs {shape}; "
                "calibrate this model"
            )
