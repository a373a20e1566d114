"""Sums over processes in tensor-parallel graphs: out of the way of matchers, and back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, GraphModule, Node

from nbl_compiler.passes.collectives import without_collectives

REDUCE = torch.ops._c10d_functional.all_reduce
WAIT = torch.ops._c10d_functional.wait_tensor


def row_parallel(*, bias: bool) -> GraphModule:
    """A projection whose results are summed over processes, added to the residual stream."""
    graph = Graph()
    x, stream, weight, added = (graph.placeholder(n) for n in ("x", "stream", "weight", "added"))
    for node, value in ((x, torch.zeros(2, 4)), (stream, torch.zeros(2, 3))):
        node.meta["example_value"] = value
    weight.meta["example_value"] = nn.Parameter(torch.zeros(3, 4))
    added.meta["example_value"] = nn.Parameter(torch.zeros(3))
    partial = graph.call_function(F.linear, (x, weight, None))
    partial.meta["example_value"] = torch.zeros(2, 3)
    reduce = graph.call_function(REDUCE, (partial, "sum", "0"))
    waited = graph.call_function(WAIT, (reduce,))
    graph.call_method("copy_", (partial, waited))
    result = graph.call_function(torch.add, (partial, added)) if bias else partial
    graph.output(graph.call_function(torch.add, (stream, result)))
    return GraphModule(nn.Module(), graph)


def calls(graph_module: GraphModule) -> list[Node]:
    return [node for node in graph_module.graph.nodes if node.op.startswith("call")]


def test_a_projection_looks_as_on_one_device_and_its_readers_read_the_sum() -> None:
    graph_module = row_parallel(bias=False)
    with without_collectives(graph_module):
        partial, addition = calls(graph_module)
        assert partial.target is F.linear
        with graph_module.graph.inserting_after(partial):
            observer = graph_module.graph.call_function(print, (partial,))
    graph_module.graph.lint()
    assert [node.target for node in calls(graph_module)] == [
        F.linear, REDUCE, WAIT, print, torch.add,
    ]  # fmt: skip
    linear, reduce, waited = calls(graph_module)[:3]
    assert reduce.args == (linear, "sum", "0")
    assert observer.args == (waited,)
    assert addition.args[1] is waited


def test_a_bias_behind_the_sum_is_the_projection_s_meanwhile() -> None:
    graph_module = row_parallel(bias=True)
    bias = next(n for n in graph_module.graph.nodes if n.name == "added")
    with without_collectives(graph_module):
        partial, addition = calls(graph_module)
        assert partial.args[2] is bias
        assert addition.args[1] is partial
    graph_module.graph.lint()
    linear, reduce, waited, biased, last = calls(graph_module)
    assert linear.args[2] is None  # or every process would add it
    assert (reduce.args[0], waited.args[0]) == (linear, reduce)
    assert biased.args == (waited, bias)
    assert last.args[1] is biased


def test_other_collectives_stay() -> None:
    graph_module = row_parallel(bias=False)
    copy = next(n for n in graph_module.graph.nodes if n.target == "copy_")
    graph_module.graph.erase_node(copy)  # a sum that is read itself, not written back
    before = [node.target for node in calls(graph_module)]
    with without_collectives(graph_module):
        assert [node.target for node in calls(graph_module)] == before
    assert [node.target for node in calls(graph_module)] == before
