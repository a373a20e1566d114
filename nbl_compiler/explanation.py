"""``nbl.explain``: what matches, what is rewritten, what is left alone and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
from rich.table import Table
from torch import nn
from torch.fx import GraphModule

from nbl_compiler import registry
from nbl_compiler.cost import graph_cost
from nbl_compiler.graph_report import GraphReport
from nbl_compiler.passes.pipeline import build_pipeline, run_pipeline
from nbl_compiler.passes.private_copy import private_copy
from nbl_compiler.plan import Plan
from nbl_compiler.report import render


@dataclass(frozen=True)
class Report:
    """What the backend would do to a model. ``print(report)`` shows a table.

    Args:
        graphs: One report per graph that Dynamo traced.
    """

    graphs: tuple[GraphReport, ...]

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
        return {item.site: item.reason for graph in self.graphs for item in graph.rejected}

    def __str__(self) -> str:
        table = Table(title=f"{len(self.matched)} sites match, {len(self.rewritten)} are rewritten",
                      title_justify="left")  # fmt: skip
        for name in ("graph", "site", "what happens", "why"):
            table.add_column(name)
        for number, graph in enumerate(self.graphs):
            left = {item.site: item for item in graph.rejected}
            for site in dict.fromkeys((*graph.matched, *left)):
                done = site in graph.rewritten
                why = "" if done else left[site].reason if site in left else "no plan"
                state = (
                    "rewritten" if done else "left dense" if site in graph.matched else "rejected"
                )
                table.add_row(str(number), site, state, why)
        return render(table)


def explain(model: nn.Module, *args: Any, plan: Plan | None = None, **kwargs: Any) -> Report:
    """Trace a model on example inputs and say what the backend does to it.

    The model runs once, unchanged; nothing is lowered.

    Args:
        model: Any module that ``torch.compile`` traces.
        *args: Example inputs, as for the model.
        plan: The plan to apply; without it, the attached one, or none.
        **kwargs: Example inputs.
    """
    plan = plan or registry.find_plan(model.parameters()) or Plan()
    graphs: list[GraphReport] = []

    def backend(graph_module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        del inputs
        copy = private_copy(graph_module)
        before = graph_cost(copy)
        runs = run_pipeline(build_pipeline(plan), copy)
        graphs.append(GraphReport(tuple(runs), before, graph_cost(copy)))
        return graph_module.forward

    with torch.no_grad():
        torch.compile(model, backend=backend)(*args, **kwargs)
    return Report(tuple(graphs))
