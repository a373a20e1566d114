"""``torch.compile(model, backend="nbl")``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from os import PathLike, fspath, stat
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from nbl_compiler import registry
from nbl_compiler.attachment_guard import guard_on_attachments
from nbl_compiler.cost import graph_cost
from nbl_compiler.dump import DumpFolder
from nbl_compiler.errors import ConfigError, InferenceOnlyError, NBLError, StrictError
from nbl_compiler.graph_report import GraphReport
from nbl_compiler.lowering.lower import LOWERINGS, Compiled, lower, mode_options
from nbl_compiler.passes.graph_tools import is_weight
from nbl_compiler.passes.lifting import lifted_tensors
from nbl_compiler.passes.pipeline import PassRun, build_pipeline, run_pipeline
from nbl_compiler.passes.private_copy import private_copy
from nbl_compiler.passes.sites import load_linearized, load_matches
from nbl_compiler.passes.upstream import upstream_weights
from nbl_compiler.plan import Plan

_NO_PLAN = (
    'backend="nbl" found no plan for this model and compiles it unchanged. Calibrate one with '
    "`plan = nbl_compiler.calibrate(model, batches)` (it is attached to the model), or pass "
    'options={"plan": plan_or_path}.'
)


@dataclass(frozen=True)
class Options:
    """What ``torch.compile(..., options={...})`` accepts.

    Args:
        plan: A plan, or the path of one; without it, the plan attached to the model.
        lowering: ``"inductor"``, ``"aot_eager"`` or ``"eager"``.
        dump_dir: Folder for graph dumps.
        strict: Raise if a graph holds sites and one that the plan rewrites is not rewritten.
        inductor: Patches of ``torch._inductor.config``.
        report: Called with a ``GraphReport`` for every compiled graph.
    """

    plan: Plan | str | PathLike[str] | None = None
    lowering: str = "inductor"
    dump_dir: str | PathLike[str] | None = None
    strict: bool = False
    inductor: Mapping[str, Any] = field(default_factory=dict)
    report: Callable[[GraphReport], None] | None = None

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None) -> Options:
        """Check and type the options.

        Raises:
            ConfigError: for an unknown option or value.
        """
        given = dict(options or {})
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                raise ConfigError(f"unknown option {name!r}; backend nbl knows {', '.join(known)}")
        parsed = cls(**given)
        if parsed.lowering not in LOWERINGS:
            raise ConfigError(f"lowering={parsed.lowering!r} must be one of {', '.join(LOWERINGS)}")
        if not isinstance(parsed.plan, Plan | str | PathLike | None):
            raise ConfigError(f"plan={parsed.plan!r} must be a Plan or the path of one")
        return parsed


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
    try:
        return _compile(graph_module, example_inputs, Options.parse(options), mode)
    except NBLError as error:
        raise _unwrapped(error) from error.__cause__


def _compile(
    graph_module: GraphModule, example_inputs: Sequence[Any], options: Options, mode: str | None
) -> Compiled:
    inductor = {**mode_options(mode), **options.inductor}
    plan = _find_plan(options, example_inputs)
    if plan is None or not plan.rewritten:
        if plan is None and any(isinstance(x, nn.Parameter) for x in example_inputs):
            _warn_once(_NO_PLAN)
        return lower(graph_module, example_inputs, options.lowering, inductor)
    _require_inference(example_inputs)
    dump = DumpFolder(options.dump_dir, plan.digest) if options.dump_dir is not None else None
    if dump is not None:
        dump.traced(graph_module)
    graph_module = private_copy(graph_module)
    weights = _values(graph_module, example_inputs)
    before = graph_cost(graph_module) if options.report is not None else None
    runs = run_pipeline(build_pipeline(plan), graph_module, dump)
    if options.report is not None and before is not None:
        options.report(GraphReport(tuple(runs), before, graph_cost(graph_module)))
    if dump is not None:
        dump.summary(graph_module)
    _check_sites(graph_module, runs, plan, options.strict)
    feeding = upstream_weights(graph_module)
    registry.check_weights((weights[n] for n in feeding if n in weights), plan, "this model")
    lifted = lifted_tensors(graph_module)
    nodes = graph_module.graph.find_nodes(op="placeholder")[len(example_inputs) :]
    fakes = [node.meta["example_value"] for node in nodes]
    compiled = lower(graph_module, [*example_inputs, *fakes], options.lowering, inductor)
    return _close_over(compiled, lifted)


def _close_over(compiled: Compiled, lifted: Sequence[Tensor]) -> Compiled:
    if not lifted:
        return compiled
    extra = tuple(lifted)

    def run(*inputs: Any) -> Any:
        return compiled(*inputs, *extra)

    return run


def _find_plan(options: Options, example_inputs: Sequence[Any]) -> Plan | None:
    if isinstance(options.plan, Plan):
        return options.plan
    if options.plan is not None:
        return _load(fspath(options.plan))
    guard_on_attachments()
    return registry.find_plan(example_inputs)


_loaded: dict[str, tuple[tuple[int, int], Plan]] = {}


def _load(path: str) -> Plan:
    """Load a plan once, so that every graph of a model shares its tensors."""
    try:
        status = stat(path)
    except FileNotFoundError:
        raise ConfigError(f"no plan at {path}; write one with plan.save(...)") from None
    stamp = (status.st_mtime_ns, status.st_size)
    known = _loaded.get(path)
    if known is None or known[0] != stamp:
        known = _loaded[path] = (stamp, Plan.load(path))
    return known[1]


def _require_inference(example_inputs: Sequence[Any]) -> None:
    wants = any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs)
    if torch.is_grad_enabled() and wants:
        raise InferenceOnlyError(
            "a linearized model is for inference: call it under torch.inference_mode() or "
            "torch.no_grad() (gradients are enabled, and an input or weight requires them)"
        )


def _values(graph_module: GraphModule, example_inputs: Sequence[Any]) -> dict[str, Tensor]:
    """Return graph input name → value for the model's parameters."""
    nodes = graph_module.graph.find_nodes(op="placeholder")
    values = {
        n.name: x for n, x in zip(nodes, example_inputs, strict=True) if isinstance(x, nn.Parameter)
    }
    for node in graph_module.graph.find_nodes(op="get_attr"):
        if is_weight(node):
            value = getattr(graph_module, str(node.target), None)
            if isinstance(value, nn.Parameter):
                values[node.name] = value
    return values


def _check_sites(
    graph_module: GraphModule, runs: Sequence[PassRun], plan: Plan, strict: bool
) -> None:
    """Speak up about sites that the plan rewrites and this graph leaves dense."""
    wanted = {site.name for site in plan.rewritten}
    refused = [
        r
        for r in load_matches(graph_module).rejected
        if (site := plan.find(r.site, "attention")) is not None and site.name in wanted
    ]
    unknown = [
        r
        for run in runs
        if run.name == "linearize_attention"
        for r in run.report.rejected
        if plan.find(r.site, "attention") is None
    ]
    if not refused and not unknown:
        return
    first = (refused + unknown)[0]
    text = (
        f"{len(refused)} site(s) of the plan cannot be rewritten in this graph and "
        f"{len(unknown)} are not in the plan; first: {first.site}: {first.reason}"
    )
    if strict:
        raise StrictError(text + "; calibrate this model, or drop strict=True")
    if not load_linearized(graph_module) or refused:
        _warn_once(text + "; they run dense")


_warned: set[str] = set()


def _warn_once(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, NBLWarning, stacklevel=2)


class NBLWarning(UserWarning):
    """Something works, but not as the user may expect."""


def _unwrapped(error: NBLError) -> NBLError:
    """Return the error in a form that Dynamo hands to the user as it is.

    Dynamo wraps what backends raise into ``BackendCompilerFailed`` unless it is a
    ``ShortenTraceback``; so the error gets that as a second base.
    """
    from torch._dynamo.exc import ShortenTraceback

    def initialise(self: Any, message: str) -> None:
        Exception.__init__(self, message)
        self.first_useful_frame = None

    kind = type(error)
    namespace = {"__init__": initialise, "__module__": kind.__module__}
    both = type(kind.__name__, (kind, ShortenTraceback), namespace)
    result = both(str(error))
    assert isinstance(result, NBLError)
    return result
