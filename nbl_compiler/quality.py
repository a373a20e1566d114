"""Dense, linearized and dropped, on the same text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from nbl_compiler.evaluate import evaluation_rows, perplexity
from nbl_compiler.plan import Plan, Site


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


def compare(
    model: nn.Module,
    tokenizer: Any,
    plan: Plan,
    documents: Iterable[str],
    *,
    tokens: int,
    length: int = 512,
    drop: bool = False,
    lowering: str = "inductor",
    progress: bool = False,
) -> dict[str, float]:
    """Return perplexities and their ratios to the dense model's, on the same rows."""
    rows = evaluation_rows(documents, tokenizer, tokens=tokens, length=length)
    plans = {"dense": Plan(), "nbl": plan, **({"dropped": dropping(plan)} if drop else {})}
    result: dict[str, float] = {}
    for name, used in plans.items():
        forward = torch.compile(model, backend="nbl", options=_options(used, lowering))
        result[name] = perplexity(forward, rows, progress=progress).perplexity
    ratios = {f"{name} / dense": value / result["dense"] for name, value in result.items()}
    return {**result, **{k: v for k, v in ratios.items() if k != "dense / dense"}}


def perplexity_of(
    model: nn.Module, tokenizer: Any, plan: Plan, documents: Iterable[str], tokens: int
) -> float:
    """Return the perplexity under one plan, without lowering (quality does not depend on it)."""
    rows = evaluation_rows(documents, tokenizer, tokens=tokens)
    forward = torch.compile(model, backend="nbl", options=_options(plan, "eager"))
    return perplexity(forward, rows).perplexity


def _options(plan: Plan, lowering: str) -> dict[str, Any]:
    return {"plan": plan, "lowering": lowering}
