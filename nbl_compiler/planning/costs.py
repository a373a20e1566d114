"""Seconds that each site takes in one step, dense and with each setting, by the roofline.

The step is traced as it will run: with a static cache of the wanted length, all sites dense; then
for each setting with a plan that uses it everywhere it can, and the cache of that plan. Rates are
those of this machine (``nbl_compiler.cost``); or each site's region is compiled and timed, and only
the rest of the step goes by the roofline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch._dynamo
from torch.fx import GraphModule

from nbl_compiler.cost import Machine, graph_cost
from nbl_compiler.errors import ConfigError
from nbl_compiler.kv_cache import cache
from nbl_compiler.passes.lifting import lifted_tensors
from nbl_compiler.passes.pipeline import build_pipeline, run_pipeline
from nbl_compiler.passes.private_copy import private_copy
from nbl_compiler.planning.budget import Budget
from nbl_compiler.plans import Plan
from nbl_compiler.site_rows import SiteRow, Snapshots, site_rows
from nbl_compiler.site_timing import region_seconds
from nbl_compiler.speed import set_length, set_up


@dataclass(frozen=True)
class StepCost:
    """What one step takes with one plan.

    Args:
        dense: Seconds of the whole step by Inductor alone, as traced.
        total: Seconds of the whole step by this backend.
        before: Site → seconds of its region, dense but compiled by this backend.
        after: Rewritten site → seconds of what is in its place.
    """

    dense: float
    total: float
    before: Mapping[str, float]
    after: Mapping[str, float]


def step_cost(
    model: Any, plan: Plan, budget: Budget, machine: Machine, *, measure: bool = False
) -> StepCost:
    """Trace one step of the model with a plan and return its cost.

    Args:
        model: The model.
        plan: Without rewritten sites for the dense model.
        budget: Says which step.
        machine: Its rates.
        measure: Compile and time the sites.

    Raises:
        ConfigError: if the model cannot run such a step.
    """
    parts: list[StepCost] = []  # several where the model breaks into more than one graph

    def backend(graph_module: GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        copy = private_copy(graph_module)
        dense = graph_cost(copy).seconds(machine)
        snapshots = Snapshots(copy)
        runs = run_pipeline(build_pipeline(plan, "inductor"), copy, snapshots)
        rows = site_rows(0, snapshots, runs, copy, plan)
        work = {w.node: machine.seconds(w) for w in graph_cost(copy).work}
        regions = [row for row in rows if row.state != "rejected"]
        cost = StepCost(
            dense,
            sum(work.values()),
            {r.site: sum(work.get(n.name, 0.0) for n in r.before.nodes) for r in regions},
            {r.site: r.after.seconds(machine) for r in regions if r.state == "rewritten"},
        )

        def run(*values: Any) -> Any:
            every = (*values, *lifted_tensors(copy))
            if measure:
                graphs = private_copy(graph_module), copy
                parts.append(_measured(cost, regions, graphs, (values, every), machine))
            else:
                parts.append(cost)
            return copy(*every)

        return run

    torch._dynamo.reset()
    with torch.no_grad():
        inputs = _step(model, plan, budget)
        torch.compile(lambda **given: model(**given), backend=backend, dynamic=False)(**inputs)
    torch._dynamo.reset()
    if not parts:
        raise ConfigError("the model was not traced: nothing to plan")
    return StepCost(
        sum(p.dense for p in parts),
        sum(p.total for p in parts),
        {site: seconds for p in parts for site, seconds in p.before.items()},
        {site: seconds for p in parts for site, seconds in p.after.items()},
    )


def _measured(
    cost: StepCost,
    rows: Sequence[SiteRow],
    graphs: tuple[GraphModule, GraphModule],
    inputs: tuple[Sequence[Any], Sequence[Any]],
    machine: Machine,
) -> StepCost:
    """Return the cost with measured seconds in place of the roofline's, for the sites.

    Args:
        cost: By the roofline.
        rows: The sites.
        graphs: As traced, and after the passes.
        inputs: Values for both.
        machine: Its rates.
    """
    done = {r.site: [n.name for n in r.after.nodes] for r in rows if r.state == "rewritten"}
    if done:  # of a plan only what it puts in place is asked for
        return replace(cost, after=region_seconds(graphs[1], done, inputs[1]))
    names = {row.site: [n.name for n in row.before.nodes] for row in rows}
    by_inductor, by_nbl = (
        region_seconds(graph, names, values) for graph, values in zip(graphs, inputs, strict=True)
    )
    traced = sum(row.before.seconds(machine) for row in rows)
    return StepCost(
        cost.dense - traced + sum(by_inductor.values()),
        cost.total - sum(cost.before.values()) + sum(by_nbl.values()),
        by_nbl,
        {},
    )


def _step(model: Any, plan: Plan, budget: Budget) -> dict[str, Any]:
    """Return the inputs of the step that the budget is about."""
    device = next(model.parameters()).device
    decodes = bool(getattr(model, "can_generate", lambda: False)())
    if budget.phase == "prefill":
        ids = torch.ones(budget.batch, budget.context, dtype=torch.long, device=device)
        return {"input_ids": ids} | ({"use_cache": False, "logits_to_keep": 1} if decodes else {})
    if not decodes:
        raise ConfigError(
            "this model does not generate tokens: plan it with Budget(phase='prefill')"
        )
    kv = cache(model, plan, budget.context + 2, "static")
    set_up(kv, model, budget.batch)
    set_length(kv, budget.context)
    ids = torch.ones(budget.batch, 1, dtype=torch.long, device=device)
    return {"input_ids": ids, "past_key_values": kv}
