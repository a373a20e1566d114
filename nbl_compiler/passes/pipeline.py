"""The order of the passes, and the one place that runs, times, verifies and dumps them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch.fx import GraphModule

from nbl_compiler.errors import ConfigError
from nbl_compiler.int8_weights import Quantize
from nbl_compiler.monitoring.watch import GraphWatch
from nbl_compiler.passes.base import Pass, PassReport
from nbl_compiler.passes.canonicalize import Canonicalize
from nbl_compiler.passes.clean_up import CleanUp
from nbl_compiler.passes.drop_cache_updates import DropCacheUpdates
from nbl_compiler.passes.extension import insert_passes
from nbl_compiler.passes.fold_ffn import FoldFFN
from nbl_compiler.passes.lifting import lifted_tensors
from nbl_compiler.passes.linearize_attention import LinearizeAttention
from nbl_compiler.passes.match_attention import MatchAttention
from nbl_compiler.passes.match_ffn import MatchFFN
from nbl_compiler.passes.stream_products import StreamProducts
from nbl_compiler.passes.watch_inputs import WatchInputs
from nbl_compiler.plans import Plan


def build_pipeline(
    plan: Plan,
    lowering: str = "eager",
    extra: Sequence[Pass] = (),
    watch: GraphWatch | None = None,
    quantize: Quantize = "auto",
    guard_tokens: int | None = None,
) -> tuple[Pass, ...]:
    """Return the passes in their order for one plan and one way of lowering.

    Args:
        plan: The plan.
        lowering: As in ``Options``.
        extra: The user's own passes (see ``nbl_compiler.passes.extension``).
        watch: Of the graph, in case it is monitored.
        quantize: As in ``Options``.
        guard_tokens: As in ``Options``.
    """
    watching = (WatchInputs(watch),) if watch is not None and watch.wanted else ()
    passes: tuple[Pass, ...] = (
        Canonicalize(),
        MatchAttention(),
        LinearizeAttention(plan, quantize=quantize),
        DropCacheUpdates(),
        MatchFFN(),
        FoldFFN(plan, quantize=quantize, guard_tokens=guard_tokens),
        *watching,
        CleanUp(),
    )
    if lowering == "inductor":
        passes = (*passes, StreamProducts())
    return insert_passes(passes, extra)


@dataclass(frozen=True)
class PassRun:
    """One pass on one graph: what it reported, and its seconds."""

    name: str
    report: PassReport
    seconds: float


class Dump(Protocol):
    """Receives the graph around every pass."""

    def before(self, index: int, name: str, graph_module: GraphModule) -> None:
        """Called before pass number ``index`` (from 1) runs."""

    def after(self, index: int, run: PassRun, graph_module: GraphModule) -> None:
        """Called after it ran and was verified."""


def run_pipeline(
    passes: Sequence[Pass], graph_module: GraphModule, dump: Dump | None = None
) -> list[PassRun]:
    """Run the passes in order on ``graph_module``, in place.

    After every pass the graph must lint, keep Dynamo's inputs in place and return as many values.
    """
    runs: list[PassRun] = []
    signature = _signature(graph_module)
    for index, step in enumerate(passes, start=1):
        if dump is not None:
            dump.before(index, step.name, graph_module)
        started = time.perf_counter()
        report = _run(step, graph_module)
        run = PassRun(step.name, report, time.perf_counter() - started)
        _verify(step.name, graph_module, signature)
        if dump is not None:
            dump.after(index, run, graph_module)
        runs.append(run)
    graph_module.recompile()
    return runs


def _run(step: Pass, graph_module: GraphModule) -> PassReport:
    try:
        report = step(graph_module)
    except Exception as error:
        error.add_note(f"in pass {step.name}")
        raise
    if not isinstance(report, PassReport):
        raise ConfigError(f"pass {step.name} returned {report!r}; a pass returns a PassReport")
    return report


def _signature(graph_module: GraphModule) -> tuple[tuple[str, ...], int]:
    inputs = tuple(n.name for n in graph_module.graph.find_nodes(op="placeholder"))
    own = len(inputs) - len(lifted_tensors(graph_module))
    (output,) = graph_module.graph.find_nodes(op="output")
    returned = output.args[0]
    return inputs[:own], len(returned) if isinstance(returned, list | tuple) else 1


def _verify(name: str, graph_module: GraphModule, signature: tuple[tuple[str, ...], int]) -> None:
    graph_module.graph.lint()
    if _signature(graph_module) != signature:
        raise RuntimeError(
            f"pass {name} changed the inputs or outputs that Dynamo relies on; this is a bug in it"
        )
