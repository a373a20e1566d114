"""In-place writes, however they are spelled: never deleted, always seen by the matcher."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from helpers.recording import rewritten_graphs
from torch import Tensor, nn
from torch.fx import Node

from nbl_compiler.passes.graph_tools import Topology, is_write, written


def relu_by_name(h: Tensor) -> None:
    F.relu(h, inplace=True)


def relu_by_position(h: Tensor) -> None:
    F.relu(h, True)


def module(h: Tensor) -> None:
    nn.functional.silu(h, inplace=True)


def augmented(h: Tensor) -> None:
    h += 1


def augmented_call(h: Tensor) -> None:
    operator.imul(h, 3)


def method(h: Tensor) -> None:
    h.add_(1)


def special_method(h: Tensor) -> None:
    h.__isub__(2)


def function(h: Tensor) -> None:
    torch.relu_(h)


def out(h: Tensor) -> None:
    torch.exp(h, out=h)


def item(h: Tensor) -> None:
    h[0] = 7


def through_a_view(h: Tensor) -> None:
    h.view(-1)[1:3].mul_(5)


WRITES = (
    relu_by_name, relu_by_position, module, augmented, augmented_call, method, special_method,
    function, out, item, through_a_view,
)  # fmt: skip


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_a_write_whose_result_is_not_used_stays(write: Callable[[Tensor], None]) -> None:
    def program(x: Tensor) -> Tensor:
        h = x * 2
        same = h
        write(h)
        return same + 1

    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    with rewritten_graphs() as graphs:
        fast = torch.compile(program, backend="nbl", options={"lowering": "eager"})
        assert torch.equal(fast(x), program(x))
    assert not torch.equal(program(x), x * 2 + 1)
    (graph,) = graphs
    writes = [node for node in graph.graph.nodes if is_write(node)]
    topology = Topology(graph)
    (product,) = (n for n in graph.graph.nodes if is_product(n, graph.graph.find_nodes))
    assert [topology.storage(written(node)) for node in writes] == [product]
    assert topology.writers[product] == writes


def is_product(node: Node, find: Callable[..., list[Node]]) -> bool:
    """Tell whether the node is ``x * 2``."""
    return node.target is operator.mul and node.args[0] in find(op="placeholder")


@pytest.mark.parametrize(
    "call",
    [
        lambda h: F.relu(h, inplace=False),
        lambda h: F.relu(h),
        lambda h: F.dropout(h, 0.0, False, False),
        lambda h: h + 1,
        lambda h: h.__add__(1),
        lambda h: torch.where((h > 0) & (h < 2), h, 1.0),
        lambda h: torch.where(operator.or_(h > 0, h < 2), h, 1.0),
    ],
)
def test_calls_that_write_nothing_are_no_writes(call: Callable[[Tensor], Tensor]) -> None:
    torch._dynamo.reset()
    with rewritten_graphs() as graphs:
        fast = torch.compile(lambda x: call(x * 2), backend="nbl", options={"lowering": "eager"})
        fast(torch.ones(3))
    (graph,) = graphs
    assert not any(is_write(node) for node in graph.graph.nodes)


def test_adding_to_a_symbolic_size_writes_nothing() -> None:
    def program(x: Tensor) -> Tensor:
        size = x.shape[0]
        size += 1
        return x * size

    torch._dynamo.reset()
    with rewritten_graphs() as graphs:
        fast = torch.compile(program, backend="nbl", dynamic=True, options={"lowering": "eager"})
        assert torch.equal(fast(torch.ones(5)), torch.full((5,), 6.0))
    (graph,) = graphs
    assert not any(is_write(node) for node in graph.graph.nodes)
