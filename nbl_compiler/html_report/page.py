"""Filling the page."""

from __future__ import annotations

import difflib
import math
from os import PathLike
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from nbl_compiler.cost import Machine
from nbl_compiler.errors import ConfigError
from nbl_compiler.html_report.curve import draw_curve, points
from nbl_compiler.html_report.drawing import draw
from nbl_compiler.plan_file import write_atomically
from nbl_compiler.report import plain
from nbl_compiler.site_rows import SiteRow

if TYPE_CHECKING:
    from nbl_compiler.explanation import Report


def save_page(report: Report, path: str | PathLike[str]) -> None:
    """Write the report as one HTML file, whole or not at all.

    Raises:
        ConfigError: if the folder does not exist or cannot be written.
    """
    text = page(report)
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise ConfigError(f"the report {path} cannot be written: {error.strerror}") from error


def page(report: Report) -> str:
    """Return the report as HTML."""
    environment = Environment(
        loader=PackageLoader("nbl_compiler.html_report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sites = [_site(number, row, report.machine) for number, row in enumerate(report.rows)]
    worst = max((s["nmse"] for s in sites if s["nmse"] is not None), default=0.0)
    return environment.get_template("page.html.j2").render(
        sites=sites,
        lanes=[
            ("attention", [site for site in sites if site["kind"] == "attention"]),
            ("FFN", [site for site in sites if site["kind"] == "ffn"]),
        ],
        matched=len(report.matched),
        rewritten=len(report.rewritten),
        rejected=sum(site["state"] == "rejected" for site in sites),
        model=report.plan.model,
        digest=report.plan.digest if report.plan.sites else "",
        worst=worst,
        curve=Markup(_curve(report)),
    )


def _site(number: int, row: SiteRow, machine: Machine | None) -> dict[str, Any]:
    changed = row.state == "rewritten"
    return {
        "id": f"site-{number}",
        "name": row.site,
        "kind": row.kind,
        "state": row.state,
        "class": row.state.replace(" ", "-"),
        "matched": row.matched,
        "reason": row.reason,
        "node": row.node,
        "source": row.source,
        "train_nmse": plain(row.nmse),
        "nmse": plain(row.holdout_nmse),
        "cca": plain(row.cca_bound),
        "bytes": (row.before.bytes, row.after.bytes),
        "flops": (row.before.flops, row.after.flops),
        "predicted": row.predicted(machine),
        "measured": row.measured,
        "before": Markup(draw(row.before.nodes)) if row.before.nodes else "",
        "after": Markup(draw(row.after.nodes)) if changed else "",
        "diff": _diff(row) if changed else [],
    }


def _diff(row: SiteRow) -> list[tuple[str, str]]:
    """Return the lines of a unified diff of both sides, each with its kind."""
    before, after = ([str(node) for node in side.nodes] for side in (row.before, row.after))
    lines = list(difflib.unified_diff(before, after, "before", "after", lineterm=""))
    kinds = {"+": "added", "-": "removed", "@": "place"}
    return [(kinds.get(line[:1], "same"), line) for line in lines[2:]]


def _curve(report: Report) -> str:
    machine = report.machine
    if machine is None or not report.graphs:
        return ""
    first = [row for row in report.rows if row.graph == 0 and row.state == "rewritten"]
    saved = [
        (row.site, row.holdout_nmse, row.before.seconds(machine) - row.after.seconds(machine))
        for row in first
        if not math.isnan(row.holdout_nmse)
    ]
    return draw_curve(points(saved, report.graphs[0].before.seconds(machine))) if saved else ""
