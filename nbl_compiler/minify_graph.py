"""Cutting a graph down to the smallest part that still fails a check."""

from __future__ import annotations

import copy
import io
import operator
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from typing import Any

import torch
from torch.fx import GraphModule
from tqdm.auto import tqdm

from nbl_compiler.dumps.failure import NOT_RUNNABLE, Failure, copied

Checker = Callable[[GraphModule, Sequence[Any]], Failure | None]


def shrink(
    graph_module: GraphModule,
    inputs: Sequence[Any],
    check: Checker,
    kind: str,
    progress: bool = False,
) -> tuple[GraphModule, list[Any]]:
    """Return the smallest graph found that fails in the same way, and its inputs.

    torch's minifier cuts off the end of the graph, and replaces parts of it by the values that
    they had, as further inputs, as long as the check fails.

    Args:
        graph_module: A graph that fails.
        inputs: Its inputs.
        check: What it fails.
        kind: How it fails.
        progress: Show a progress bar.
    """
    from functorch.compile import minifier

    def fails(candidate: GraphModule, values: Sequence[Any]) -> bool:
        bar.set_postfix_str(f"{count_calls(candidate)} calls", refresh=False)
        bar.update(1)
        if _returns_a_write(candidate):
            return False
        try:
            found = check(candidate, values)
        except NOT_RUNNABLE:  # cut where it cannot be: between entering and leaving vmap, say
            return False
        return found is not None and found.kind == kind

    smallest, values = graph_module, inputs
    with tqdm(desc="minify", unit=" attempts", disable=not progress) as bar, torch.no_grad():
        try:
            with redirect_stderr(io.StringIO()):  # it reports every attempt
                smallest, values = minifier(
                    graph_module, copied(inputs), fails, dump_state=lambda graph, values: None
                )
        except RuntimeError:
            # It first runs the graph once; where that writes into an input, the check that follows
            # sees other numbers, and may pass.
            pass
        return _without_idle_writes(smallest, list(values), fails)


def _without_idle_writes(
    graph_module: GraphModule,
    inputs: list[Any],
    fails: Callable[[GraphModule, Sequence[Any]], bool],
) -> tuple[GraphModule, list[Any]]:
    """Leave out the writes that the failure does not need, and inputs that nothing reads.

    torch's minifier keeps both where it takes a call for one with an effect.
    """
    names = [n.name for n in graph_module.graph.nodes if n.op.startswith("call") and not n.users]
    for name in reversed(names):
        candidate = GraphModule(graph_module, copy.deepcopy(graph_module.graph))
        (node,) = [n for n in candidate.graph.nodes if n.name == name]
        candidate.graph.erase_node(node)
        candidate.recompile()
        if fails(candidate, inputs):
            graph_module = candidate
    pairs = zip(graph_module.graph.find_nodes(op="placeholder"), inputs, strict=True)
    used = [(node, value) for node, value in pairs if node.users]
    values = [value for _, value in used]
    candidate = GraphModule(graph_module, copy.deepcopy(graph_module.graph))
    for node in candidate.graph.find_nodes(op="placeholder"):
        if not node.users:
            candidate.graph.erase_node(node)
    candidate.recompile()
    return (candidate, values) if fails(candidate, values) else (graph_module, inputs)


def _returns_a_write(graph_module: GraphModule) -> bool:
    """Tell whether ``x[i] = y`` itself is returned: x by generated code, None by an interpreter."""
    (output,) = graph_module.graph.find_nodes(op="output")
    return any(node.target is operator.setitem for node in output.all_input_nodes)


def count_calls(graph_module: GraphModule) -> int:
    """Return how many nodes of the graph compute something."""
    quiet = ("placeholder", "get_attr", "output")
    return sum(node.op not in quiet for node in graph_module.graph.nodes)
