"""The plan that drops what another rewrites: what replacing a site has to beat."""

from __future__ import annotations

from dataclasses import replace

import torch

from nbl_compiler.plans import Plan, Site


def dropping(plan: Plan) -> Plan:
    """Return a plan that drops what ``plan`` rewrites: maps of zero, so that y = 0."""
    sites = tuple(_dropped(site) if site.decision == "rewritten" else site for site in plan.sites)
    return Plan(sites, plan.fingerprint, plan.model, plan.config)


def _dropped(site: Site) -> Site:
    if site.kind == "attention":
        return replace(site, tensors={k: torch.zeros_like(t) for k, t in site.tensors.items()})
    width_in, width_out = (int(site.details[k]) for k in ("width_in", "width_out"))
    tensors = {"weight": torch.zeros(width_out, width_in), "bias": torch.zeros(width_out)}
    return replace(site, tensors=tensors, details={**site.details, "form": "keep+fold", "kept": 0})
