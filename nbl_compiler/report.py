"""Tables for people."""

from __future__ import annotations

import math

from rich.console import Console, RenderableType
from rich.table import Table

from nbl_compiler.plans import Plan, Site


def render(*parts: RenderableType, width: int = 110) -> str:
    """Return the parts as plain text."""
    console = Console(width=width, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as capture:
        for part in parts:
            console.print(part)
    return capture.get().rstrip("\n")


def plan_table(plan: Plan) -> Table:
    """Return one row a site: decision, errors, parameters before and after, reason."""
    done = len(plan.rewritten)
    title = f"plan for {plan.model or 'a model'}: {done} of {len(plan.sites)} sites rewritten"
    read, stored = _totals(plan)
    caption = (
        f"rewritten sites read {read} parameters a token; the plan holds {stored:,} bytes; "
        f"digest {plan.digest[:16]}"
    )
    table = Table(title=title, title_justify="left", caption=caption)
    for name in ("site", "decision"):
        table.add_column(name, no_wrap=True)
    for name in ("NMSE", "held out", "CCA bound", "parameters"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("reason")
    for site in plan.sites:
        table.add_row(
            site.name, site.decision, number(site.nmse), number(site.holdout_nmse),
            number(site.cca_bound, 1), _parameters(site), site.reason,
        )  # fmt: skip
    return table


def _totals(plan: Plan) -> tuple[str, int]:
    before = sum(int(site.details.get("parameters", 0)) for site in plan.rewritten)
    after = sum(site.parameters_read for site in plan.rewritten)
    stored = sum(t.numel() * t.element_size() for t in plan.tensors().values())
    return f"{before:,} → {after:,}", stored


def number(value: float, digits: int = 3) -> str:
    """Return the value as text, or a dash for NaN."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _parameters(site: Site) -> str:
    before = site.details.get("parameters")
    if before is None:
        return "-"
    if site.decision != "rewritten":
        return f"{before:,}"
    return f"{before:,} → {site.parameters_read:,}"


def plain(value: float) -> float | None:
    """Return the value for JSON and templates, which have no NaN."""
    return None if math.isnan(value) else value
