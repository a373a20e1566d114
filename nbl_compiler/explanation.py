"""``nbl.explain``: what matches, what is rewritten, what is left alone and why."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from rich.table import Table
from torch import nn
from torch.fx import GraphModule

from nbl_compiler import registry
from nbl_compiler.cost import Machine, graph_cost
from nbl_compiler.graph_report import GraphReport
from nbl_compiler.html_report.page import save_page
from nbl_compiler.int8_weights import Quantize
from nbl_compiler.machine import measure_machine
from nbl_compiler.passes.lifting import lifted_tensors
from nbl_compiler.passes.pipeline import build_pipeline, run_pipeline
from nbl_compiler.passes.private_copy import private_copy
from nbl_compiler.plans import Plan
from nbl_compiler.report import number, plain, render
from nbl_compiler.site_rows import SiteRow, Snapshots, site_rows
from nbl_compiler.site_timing import time_sites

_WIDE = 130


@dataclass(frozen=True)
class Report:
    """What the backend would do to a model. ``print(report)`` shows a table.

    Args:
        graphs: One report per graph that Dynamo traced.
        rows: One row a site and graph, in graph order.
        machine: The rates that predicted times go by; None where they were not measured.
        plan: The plan that was applied (an empty one without a plan).
        calls: How many nodes were traced, for the case that nothing matches.
    """

    graphs: tuple[GraphReport, ...]
    rows: tuple[SiteRow, ...] = ()
    machine: Machine | None = None
    plan: Plan = field(default_factory=Plan)
    calls: int = 0

    @property
    def matched(self) -> tuple[str, ...]:
        """Names of the sites that match, over all graphs."""
        return tuple(site for graph in self.graphs for site in graph.matched)

    @property
    def rewritten(self) -> tuple[str, ...]:
        """Names of the sites that the plan replaces, over all graphs."""
        return tuple(site for graph in self.graphs for site in graph.rewritten)

    @property
    def reasons(self) -> dict[str, str]:
        """Site → why it is left alone."""
        return {row.site: row.reason for row in self.rows if row.reason}

    @property
    def near_miss(self) -> SiteRow | None:
        """Of the rejected sites, the one that came furthest through the matcher's steps."""
        refused = {(r.kind, r.site): r.passed for graph in self.graphs for r in graph.rejected}
        rows = [row for row in self.rows if row.state == "rejected"]
        return max(rows, key=lambda row: refused.get((row.kind, row.site), 0), default=None)

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "matched": self.matched,
            "rewritten": self.rewritten,
            "reasons": self.reasons,
            "plan": self.plan.digest if self.plan.sites else None,
            "sites": [_row_json(row, self.machine) for row in self.rows],
        }

    def save_html(self, path: str | PathLike[str]) -> None:
        """Write the report as one HTML file that needs nothing else to be read.

        Raises:
            ConfigError: if it cannot be written.
        """
        save_page(self, path)

    def __str__(self) -> str:
        return render(*self.tables(), width=150)

    def tables(self, width: int = 150) -> list[Any]:
        """Return what ``print`` shows, for a rich console of this width (characters).

        Where the reasons do not fit beside the figures, they follow as a list.
        """
        wide = width >= _WIDE
        title = f"{len(self.matched)} sites match, {len(self.rewritten)} are rewritten"
        if not self.matched:
            return [title, _nothing(self)]
        several = len(self.graphs) > 1
        timed = any(row.measured for row in self.rows)
        table = Table(title=title, title_justify="left")
        if several:
            table.add_column("graph")
        table.add_column("site", no_wrap=wide, overflow="fold")
        table.add_column("what happens", no_wrap=wide)
        for name in ("held out", "CCA", "MB", "MFLOP", "predicted ms"):
            table.add_column(name, justify="right", no_wrap=wide)
        if timed:
            table.add_column("measured ms", justify="right", no_wrap=wide)
        if wide:
            table.add_column("what matched, or why not")
        whys = []
        for row in self.rows:
            cells = [
                row.site, row.state, number(row.holdout_nmse), number(row.cca_bound, 1),
                _pair(row.before.bytes / 1e6, row.after.bytes / 1e6),
                _pair(row.before.flops / 1e6, row.after.flops / 1e6),
                _milliseconds(row.predicted(self.machine)),
            ]  # fmt: skip
            if timed:
                cells.append(_milliseconds(row.measured))
            where = ", ".join(filter(None, (f"node {row.node}", place(row.source))))
            why = f"{row.reason} ({where})" if row.reason else row.matched
            whys.append(f"{row.site}: {why}")
            table.add_row(*([str(row.graph)] if several else []), *cells, *([why] if wide else []))
        return [table] if wide else [table, *whys]


def explain(
    model: nn.Module,
    *args: Any,
    plan: Plan | None = None,
    measure: bool = False,
    lowering: str = "inductor",
    quantize: Quantize = "auto",
    **kwargs: Any,
) -> Report:
    """Trace a model on example inputs and say what the backend does to it.

    The model runs once, unchanged. Nothing is lowered, unless times are to be measured.

    Args:
        model: Any module that ``torch.compile`` traces.
        *args: Example inputs, as for the model.
        plan: The plan to apply; without it, the attached one, or none.
        measure: Also cut every rewritten site out of the graph and time it, before against after.
        lowering: How sites that are measured are lowered.
        quantize: As in the backend's options.
        **kwargs: Example inputs.

    Raises:
        NBLError: as compiling the model with this plan would.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile(model) was made of
    plan = plan or registry.find_plan(model.parameters()) or Plan()
    tracer = _Tracer(plan, lowering if measure else None, quantize)
    with torch.no_grad():
        torch.compile(model, backend=tracer.backend)(*args, **kwargs)
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    return Report(
        tuple(tracer.graphs), tuple(tracer.rows), _rates() if on_cpu else None, plan, tracer.calls
    )


class _Tracer:
    """A Dynamo backend that runs the passes on a copy and the graph itself as it is."""

    def __init__(self, plan: Plan, lowering: str | None, quantize: Quantize) -> None:
        self._plan, self._lowering, self._quantize = plan, lowering, quantize
        self.graphs: list[GraphReport] = []
        self.rows: list[SiteRow] = []
        self.calls = 0

    def backend(self, graph_module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        del inputs
        copy = private_copy(graph_module)
        self.calls += sum(node.op.startswith("call") for node in copy.graph.nodes)
        before = graph_cost(copy)
        snapshots = Snapshots(copy)
        runs = run_pipeline(build_pipeline(self._plan, quantize=self._quantize), copy, snapshots)
        number = len(self.graphs)
        self.graphs.append(GraphReport(tuple(runs), before, graph_cost(copy)))
        rows = site_rows(number, snapshots, runs, copy, self._plan)
        first = len(self.rows)
        self.rows += rows
        if self._lowering is None or not any(row.state == "rewritten" for row in rows):
            return graph_module.forward
        lowering = self._lowering

        def run(*values: Any) -> Any:
            regions = {
                row.site: ([n.name for n in row.before.nodes], [n.name for n in row.after.nodes])
                for row in rows
                if row.state == "rewritten"
            }
            both = (values, (*values, *lifted_tensors(copy)))
            times = time_sites(private_copy(graph_module), copy, regions, both, lowering)
            for place, row in enumerate(rows, start=first):
                self.rows[place] = replace(row, measured=times.get(row.site))
            return graph_module(*values)

        return run


@lru_cache(maxsize=1)
def _rates() -> Machine:
    """Return this machine's rates, measured once a process."""
    return measure_machine(repeats=5, streamed=False)


def _row_json(row: SiteRow, machine: Machine | None) -> dict[str, Any]:
    seconds = {"predicted_ms": row.predicted(machine), "measured_ms": row.measured}
    return {
        "graph": row.graph, "site": row.site, "kind": row.kind, "state": row.state,
        "matched": row.matched, "reason": row.reason, "node": row.node, "source": row.source,
        "nmse": plain(row.nmse), "holdout_nmse": plain(row.holdout_nmse),
        "cca_bound": plain(row.cca_bound),
        "bytes": [row.before.bytes, row.after.bytes], "flops": [row.before.flops, row.after.flops],
        **{name: pair and [1e3 * s for s in pair] for name, pair in seconds.items()},
    }  # fmt: skip


def _pair(before: float, after: float) -> str:
    """Return ``before → after`` with three significant digits, or one number if they agree."""
    texts = [f"{value:.3g}" for value in (before, after)]
    return texts[0] if before == after else " → ".join(texts)


def _milliseconds(seconds: tuple[float, float] | None) -> str:
    return "-" if seconds is None else _pair(*(1e3 * s for s in seconds))


def _nothing(report: Report) -> str:
    """Say why nothing matches, by the nearest miss."""
    near = report.near_miss
    if near is not None:
        return (
            f"nearest miss: {near.site} ({near.kind}): {near.reason}; node {near.node}, "
            f"{near.source or 'no source recorded'}"
        )
    return (
        f"among {report.calls} traced calls in {len(report.graphs)} graph(s) there is neither "
        "attention (scaled_dot_product_attention, or a softmax between two products) nor an "
        "activation between two linear layers"
    )


def place(source: str) -> str:
    """Return ``file.py:12`` for a source line as Dynamo records it, or an empty string."""
    found = re.search(r'File "([^"]+)", line (\d+)', source)
    return f"{Path(found[1]).name}:{found[2]}" if found else ""
