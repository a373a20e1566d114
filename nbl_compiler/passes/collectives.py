"""Tensor-parallel graphs, written as those of one device while sites are looked for.

    h = linear(x, W_part); …                     h = linear(x, W_part); …
    o = linear(h, V_part)                        y = linear(h, V_part, b)
    o.copy_(wait_tensor(all_reduce(o)))    →
    y = o + b

Every process sees whole hidden states, so the sites are where they are on one device; only the
sum over the processes is in the way. It is taken out, the matchers run and observers (or switches)
are inserted, and it is put back behind each projection: what was inserted reads the sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from nbl_compiler.passes.graph_tools import argument, example_value, is_addition, weight_behind

_FUNCTIONAL = "_c10d_functional"


@dataclass(frozen=True)
class _Sum:
    """One sum over processes.

    Args:
        partial: The projection whose results are summed.
        arguments: Of the all-reduce, behind the tensor.
        bias: What is added to the sum, if that is a parameter.
    """

    partial: Node
    arguments: tuple[Any, ...]
    bias: Node | None


@contextmanager
def without_collectives(graph_module: GraphModule) -> Iterator[None]:
    """Take the sums over processes out of a graph; put them back on leaving."""
    reduces = [node for node in graph_module.graph.nodes if _is_functional(node, "all_reduce")]
    sums = [made for node in reduces if (made := _take_out(node)) is not None]
    yield
    for one in sums:
        _put_back(graph_module, one)


def _is_functional(node: Node, name: str) -> bool:
    """Tell whether the node calls one of torch's functional collectives."""
    target = node.target
    told = getattr(target, "_qualified_op_name", "") or getattr(target, "__name__", "")
    return node.op == "call_function" and told == f"{_FUNCTIONAL}::{name}"


def _take_out(reduce: Node) -> _Sum | None:
    """Take out one all-reduce that is waited for and written back, or return None."""
    partial = reduce.args[0]
    waits = list(reduce.users)
    if not isinstance(partial, Node) or len(waits) != 1:
        return None
    (wait,) = waits
    copies = list(wait.users)
    if len(copies) != 1 or copies[0].target != "copy_" or copies[0].args[0] is not partial:
        return None
    (copy,) = copies
    copy.replace_all_uses_with(partial)
    for node in (copy, wait, reduce):
        node.graph.erase_node(node)
    return _Sum(partial, tuple(reduce.args[1:]), _take_bias(partial))


def _take_bias(partial: Node) -> Node | None:
    """Let the projection add the bias that was added to the sum."""
    users = list(partial.users)
    if len(users) != 1 or not is_addition(users[0]) or argument(partial, 2, "bias") is not None:
        return None
    (addition,) = users
    bias = addition.args[1] if addition.args[0] is partial else addition.args[0]
    if not isinstance(bias, Node) or weight_behind(bias) is None:
        return None
    value = example_value(bias)
    if not isinstance(value, torch.Tensor) or value.ndim != 1:
        return None
    if bias.op != "placeholder":
        partial.prepend(bias)  # a part of the parameter, taken behind the projection
    partial.args = (*partial.args[:2], bias)
    addition.replace_all_uses_with(partial)
    partial.graph.erase_node(addition)
    return bias


def _put_back(graph_module: GraphModule, taken: _Sum) -> None:
    partial, graph = taken.partial, graph_module.graph
    users = list(partial.users)
    if taken.bias is not None:
        partial.args = (*partial.args[:2], None)
    operations = torch.ops._c10d_functional
    with graph.inserting_after(partial):
        reduce = graph.call_function(operations.all_reduce, (partial, *taken.arguments))
    with graph.inserting_after(reduce):
        result = graph.call_function(operations.wait_tensor, (reduce,))
    if taken.bias is not None:
        with graph.inserting_after(result):
            result = graph.call_function(torch.add, (result, taken.bias))
    result.meta["example_value"] = example_value(partial)
    for user in users:
        user.replace_input_with(partial, result)
