"""Last pass before Inductor on a CPU: linear layers of a few tokens as multiply-and-sum.

    before   y = linear(x, W, b)               x [..., d] of at most 8 tokens (half precision: 4)
    after    y = streamed_linear(x, W, b)      the same, summed in another order

    before   y = linear(x, W, b)               W held as int8, at most 16 tokens; or int8_linear
    after    y = streamed_int8_linear(x, codes, scale, b)

Whether it applies is decided from static shapes: the step of a decode, not its prefill. Matrices
stored as [d, n] (``Conv1D``) stay, since their rows do not lie in memory one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from nbl_compiler.int8_weights import int8_matrix, is_quantized
from nbl_compiler.lowering.int8_linear import (
    int8_linear,
    int8_stream_tokens,
    streamed_int8_linear,
)
from nbl_compiler.lowering.streamed_linear import stream_tokens, streamed_linear
from nbl_compiler.passes.base import PassReport
from nbl_compiler.passes.emit import Emitter
from nbl_compiler.passes.graph_tools import argument, example_value, is_call

_LINEAR = frozenset({F.linear, torch._C._nn.linear})
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class StreamProducts:
    """Replace ``linear`` by ``streamed_linear`` where a CPU multiplies a few tokens."""

    name: str = "stream_products"

    def __call__(self, graph_module: GraphModule) -> PassReport:
        count = int8 = 0
        for node in list(graph_module.graph.nodes):
            if is_call(node, {int8_linear}) and _few(node, int8_stream_tokens):
                node.target = streamed_int8_linear
            elif is_call(node, _LINEAR) and _is_int8(node) and _few(node, int8_stream_tokens):
                _read_codes(node)
            elif is_call(node, _LINEAR) and _is_plain(node) and _few(node, stream_tokens):
                node.args = _arguments(node)
                node.kwargs = {}
                node.target = streamed_linear
            else:
                continue
            count += 1
            int8 += node.target is streamed_int8_linear
        held = f", {int8} of them held as int8" if int8 else ""
        return PassReport(notes=(f"{count} linear layers streamed{held}",))


def _arguments(node: Node) -> tuple[Any, Any, Any]:
    return argument(node, 0, "input"), argument(node, 1, "weight"), argument(node, 2, "bias")


def _weight(node: Node) -> Tensor | None:
    weight = argument(node, 1, "weight")
    value = example_value(weight) if isinstance(weight, Node) else None
    return value if isinstance(value, Tensor) else None


def _is_int8(node: Node) -> bool:
    weight = _weight(node)
    return weight is not None and int8_matrix(weight) is not None


def _is_plain(node: Node) -> bool:
    """Tell whether the layer's matrix can be read row by row in the dtype of x."""
    x, weight = argument(node, 0, "input"), _weight(node)
    value = example_value(x) if isinstance(x, Node) else None
    if weight is None or not isinstance(value, Tensor) or is_quantized(weight):
        return False
    return weight.dtype == value.dtype and weight.ndim == 2 and weight.stride(-1) == 1


def _few(node: Node, most: Callable[[torch.dtype], int]) -> bool:
    """Tell whether the layer runs on a CPU, on a known and small number of tokens."""
    x = argument(node, 0, "input")
    value = example_value(x) if isinstance(x, Node) else None
    if not isinstance(value, Tensor):
        return False
    sizes = value.shape[:-1]
    return (
        value.device.type == "cpu"
        and value.dtype in _DTYPES
        and all(isinstance(size, int) for size in sizes)
        and 0 < prod(sizes) <= most(value.dtype)
    )


def _read_codes(node: Node) -> None:
    """Let a layer read the two tensors that its quantized weight consists of."""
    x, weight, bias = _arguments(node)
    with node.graph.inserting_before(node):
        emitter = Emitter(node.graph, node.meta)
        codes = emitter.call(getattr, weight, "qdata")
        scale = emitter.call(torch.flatten, emitter.call(getattr, weight, "scale"))
    node.args, node.kwargs = (x, codes, scale, bias), {}
    node.target = streamed_int8_linear
