"""``torch.compile(model, backend="nbl")``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from os import fspath
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from nbl_compiler import registry
from nbl_compiler.cost import graph_cost
from nbl_compiler.dumps.folder import DumpFolder
from nbl_compiler.errors import ConfigError, InferenceOnlyError, NBLWarning, StrictError
from nbl_compiler.generate import run_compiled_in_generate
from nbl_compiler.graph_report import REWRITING, GraphReport
from nbl_compiler.identity_guard import code_being_compiled, guard_on_weights
from nbl_compiler.lowering.lower import Compiled, lower
from nbl_compiler.monitoring.watch import GraphWatch, guard_on_watch
from nbl_compiler.options import Options
from nbl_compiler.passes.ffn_sites import FFNMatch, load_ffn_matches, load_folded
from nbl_compiler.passes.graph_tools import is_weight
from nbl_compiler.passes.lifting import lifted_tensors
from nbl_compiler.passes.pipeline import PassRun, build_pipeline, run_pipeline
from nbl_compiler.passes.private_copy import private_copy
from nbl_compiler.passes.sites import AttentionMatch, load_linearized, load_matches
from nbl_compiler.passes.upstream import upstream_weights
from nbl_compiler.passes.watch_inputs import site_weights
from nbl_compiler.plan_file import load_shared
from nbl_compiler.plans import Plan, Site
from nbl_compiler.released_weights import refuse_released
from nbl_compiler.tensor_parallel import is_spread
from nbl_compiler.trace import announce
from nbl_compiler.user_errors import reported_by_dynamo

_NO_PLAN = (
    'backend="nbl" found no plan for this model and compiles it unchanged. Calibrate one with '
    "`plan = nbl_compiler.calibrate(model, batches)` (it is attached to the model), or pass "
    'options={"plan": plan_or_path}.'
)


def nbl(
    graph_module: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Compiled:
    """Compile one Dynamo graph (the entry point behind ``backend="nbl"``).

    Args:
        graph_module: The traced graph; its parameters are graph inputs.
        example_inputs: One value per graph input.
        options: See ``Options``.
        mode: torch.compile's ``mode``, handed to Inductor.

    Raises:
        NBLError: for every user's mistake (see ``nbl_compiler.errors``).
    """
    with reported_by_dynamo():
        return _compile(graph_module, example_inputs, Options.parse(options, mode))


def _compile(
    graph_module: GraphModule, example_inputs: Sequence[Any], options: Options
) -> Compiled:
    patches = options.inductor_patches()
    plan = _find_plan(options, graph_module, example_inputs)
    dump = None
    if options.dump_dir is not None:
        digest = None if plan is None else plan.digest
        dump = DumpFolder(options.dump_dir, digest, options.dump_inputs)
        dump.traced(graph_module, example_inputs)
    # With a plan that rewrites nothing, products are streamed, where that is possible.
    streams = options.lowering == "inductor" and _infers_alone(example_inputs)
    if not options.passes and (plan is None or not (plan.rewritten or streams)):
        announce(plan, (), graph_module)
        if dump is not None:
            dump.summary(graph_module)
        refuse_released(example_inputs, "a model without this plan")
        return lower(graph_module, example_inputs, options.lowering, patches)
    plan = plan or Plan()
    if plan.rewritten:
        _require_inference(example_inputs)
        _refuse_parts(example_inputs)
        guard_on_weights(graph_module)
    graph_module = private_copy(graph_module)
    weights = _weights(graph_module, example_inputs)
    before = graph_cost(graph_module) if options.report is not None else None
    watch = GraphWatch(plan)
    passes = build_pipeline(
        plan, options.lowering, options.passes, watch, options.quantize, options.guard_tokens
    )
    runs = run_pipeline(passes, graph_module, dump)
    guard_on_watch(watch, site_weights(graph_module))
    announce(plan, runs, graph_module)
    if options.report is not None and before is not None:
        options.report(GraphReport(tuple(runs), before, graph_cost(graph_module)))
    if dump is not None:
        dump.summary(graph_module)
    _check_sites(graph_module, runs, plan, options.strict)
    if plan.rewritten:
        _check_weights(graph_module, weights, plan)
    read = (weights.get(n.name) for n in graph_module.graph.nodes if is_weight(n) and n.users)
    refuse_released(read, "this graph")
    lifted = lifted_tensors(graph_module)
    nodes = graph_module.graph.find_nodes(op="placeholder")[len(example_inputs) :]
    fakes = [node.meta["example_value"] for node in nodes]
    compiled = lower(graph_module, [*example_inputs, *fakes], options.lowering, patches)
    return _close_over(compiled, lifted, plan, watch)


def _close_over(
    compiled: Compiled, lifted: Sequence[Tensor], plan: Plan, watch: GraphWatch
) -> Compiled:
    if not lifted:
        return compiled
    extra = tuple(lifted)

    def run(*inputs: Any) -> Any:
        return compiled(*inputs, *extra)

    run.plan = plan  # type: ignore[attr-defined]  # keeps a plan given by its path loaded
    run.watch = watch  # type: ignore[attr-defined]  # its sums are found as long as it runs
    return run


def _find_plan(
    options: Options, graph_module: GraphModule, example_inputs: Sequence[Any]
) -> Plan | None:
    if isinstance(options.plan, Plan):
        return options.plan
    if options.plan is not None:
        return load_shared(fspath(options.plan))
    guard_on_weights(graph_module)
    registry.remember_compiled(example_inputs, code_being_compiled())
    plan = registry.find_plan(example_inputs)
    if plan is None and any(isinstance(x, nn.Parameter) for x in example_inputs):
        _warn_once(_NO_PLAN)
    return plan


def _infers_alone(example_inputs: Sequence[Any]) -> bool:
    """Tell whether no gradients are wanted, and no weight is spread over processes."""
    spread = any(is_spread(x) for x in example_inputs)
    return not _wants_gradients(example_inputs) and not spread


def _wants_gradients(example_inputs: Sequence[Any]) -> bool:
    wants = any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs)
    return torch.is_grad_enabled() and wants


def _require_inference(example_inputs: Sequence[Any]) -> None:
    if _wants_gradients(example_inputs):
        raise InferenceOnlyError(
            "a linearized model is for inference: call it under torch.inference_mode() or "
            "torch.no_grad() (gradients are enabled, and an input or weight requires them)"
        )


def _refuse_parts(example_inputs: Sequence[Any]) -> None:
    if any(is_spread(x) for x in example_inputs):
        raise ConfigError(
            "a tensor-parallel model can be calibrated, but does not run a plan; load the model on "
            "one device to compile it with its plan"
        )


def _weights(graph_module: GraphModule, example_inputs: Sequence[Any]) -> dict[str, Tensor]:
    """Return node name → value for the model's parameters."""
    nodes = graph_module.graph.find_nodes(op="placeholder")
    values: dict[str, Tensor] = {
        n.name: x for n, x in zip(nodes, example_inputs, strict=True) if isinstance(x, nn.Parameter)
    }
    for node in graph_module.graph.find_nodes(op="get_attr"):
        if is_weight(node):
            value = getattr(graph_module, str(node.target), None)
            if isinstance(value, nn.Parameter):
                values[node.name] = value
    return values


def _check_weights(graph_module: GraphModule, weights: Mapping[str, Tensor], plan: Plan) -> None:
    """Raise unless the maps belong to these weights: to each site's own, and to all before it.

    The second test alone would let pass a model whose layers were reordered or pruned.
    """
    feeding = {name: weights[name] for name in upstream_weights(graph_module) if name in weights}
    registry.check_weights(feeding, plan, "this model")
    done: list[tuple[AttentionMatch | FFNMatch, Site | None]] = [
        *((m, plan.find(m.site, "attention")) for m in load_linearized(graph_module)),
        *((m, plan.find(m.site, "ffn")) for m in load_folded(graph_module)),
    ]
    for match, site in done:
        known = None if site is None else site.details.get("weights")
        if known is not None:
            own = {w.name: weights[w.name] for w in match.weights if w.name in weights}
            sketches = [plan.fingerprint[i] for i in known]
            registry.check_weights(own, plan, match.site, sketches)


def _check_sites(
    graph_module: GraphModule, runs: Sequence[PassRun], plan: Plan, strict: bool
) -> None:
    """Speak up about sites that the plan rewrites and this graph leaves dense."""
    wanted = {(site.kind, site.name) for site in plan.rewritten}
    matches = (load_matches(graph_module), load_ffn_matches(graph_module))
    refused, unknown = [], []
    for rejected in (r for found in matches for r in found.rejected):
        site = plan.find(rejected.site, rejected.kind)
        if site is not None and (site.kind, site.name) in wanted:
            refused.append(rejected)
    kinds = {site.kind for site in plan.sites}
    for run in runs:
        if run.name in REWRITING:
            unknown += [
                r
                for r in run.report.rejected
                if r.kind in kinds and plan.find(r.site, r.kind) is None
            ]
    if not refused and not unknown:
        return
    first = (refused + unknown)[0]
    faults = ((refused, "of the plan cannot be rewritten here"), (unknown, "not in the plan"))
    counts = " and ".join(f"{len(sites)} site(s) {what}" for sites, what in faults if sites)
    text = f"{counts}; first: {first.site}: {first.reason}"
    if strict:
        raise StrictError(text + "; calibrate this model, or drop strict=True")
    if refused or not (load_linearized(graph_module) or load_folded(graph_module)):
        _warn_once(text + "; they run dense")


_warned: set[str] = set()


def _warn_once(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, NBLWarning, stacklevel=2)


run_compiled_in_generate(nbl)
