"""torch's own channels: ``TORCH_LOGS`` and ``TORCH_TRACE``.

``TORCH_LOGS=nbl_compiler`` prints one line for every compiled graph, ``TORCH_LOGS=+nbl_compiler``
every pass, every site that was left alone with its reason, and the rewritten graph. The logger is
Python's own, so ``logging`` configures it as well. ``TORCH_TRACE=folder`` gets the same as
artifacts, which ``tlparse`` shows beside Dynamo's and Inductor's.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

from torch._guards import CompileContext
from torch._logging._internal import trace_structured
from torch.fx import GraphModule

from nbl_compiler.passes.pipeline import PassRun
from nbl_compiler.plans import Plan

_log = logging.getLogger(__name__)


def announce(plan: Plan | None, runs: Sequence[PassRun], graph_module: GraphModule) -> None:
    """Tell the log and the structured trace what the passes did to one graph.

    Args:
        plan: The plan that was applied, or None.
        runs: The passes.
        graph_module: The graph as it goes to the lowering.
    """
    if _log.isEnabledFor(logging.INFO):
        _log.info("%s", _headline(plan, runs))
    if _log.isEnabledFor(logging.DEBUG):
        for line in _lines(runs):
            _log.debug("%s", line)
        _log.debug("graph after the passes\n%s", graph_module.print_readable(print_output=False))
    _artifact("nbl_passes", "json", lambda: json.dumps(_facts(plan, runs), indent=2))
    _artifact(
        "nbl_graph_after_passes",
        "string",
        lambda: graph_module.print_readable(print_output=False),
    )


def _headline(plan: Plan | None, runs: Sequence[PassRun]) -> str:
    reports = [run.report for run in runs]
    matched = {site for report in reports for site in report.matched}
    rewritten = {site for report in reports for site in report.rewritten}
    left = {item.site for report in reports for item in report.rejected}
    name = "no plan" if plan is None else f"plan {plan.digest[:16]}"
    seconds = sum(run.seconds for run in runs)
    return (
        f"graph {_compile_id()}: {name}; {len(matched)} sites match, {len(rewritten)} are "
        f"rewritten, {len(left)} left alone; {len(runs)} passes in {seconds * 1e3:.0f} ms"
    )


def _compile_id() -> str:
    """Return Dynamo's number of the graph, such as ``0/1``."""
    found = CompileContext.current_compile_id()
    return "outside Dynamo" if found is None else str(found)


def _lines(runs: Sequence[PassRun]) -> list[str]:
    lines = []
    for run in runs:
        report = run.report
        lines.append(f"pass {run.name}: {run.seconds * 1e3:.1f} ms")
        lines += [f"  rewritten {site}" for site in report.rewritten]
        lines += [
            f"  left alone {item.site}: {item.reason} (node {item.node}; {item.source})"
            for item in report.rejected
        ]
        lines += [f"  {note}" for note in report.notes]
    return lines


def _facts(plan: Plan | None, runs: Sequence[PassRun]) -> dict[str, Any]:
    return {
        "plan": None if plan is None else plan.digest,
        "passes": [
            {
                "name": run.name,
                "seconds": run.seconds,
                "matched": run.report.matched,
                "rewritten": run.report.rewritten,
                "left_alone": [vars(item) for item in run.report.rejected],
                "notes": run.report.notes,
            }
            for run in runs
        ],
    }


def _artifact(name: str, encoding: str, payload: Any) -> None:
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": encoding},
        payload_fn=payload,
        expect_trace_id=False,
    )
