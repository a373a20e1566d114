"""Last pass before Inductor on a CPU: linear layers of a few tokens as multiply-and-sum.

    before   y = linear(x, W, b)               x [..., d] of at most 4 tokens, W [n, d]
    after    y = streamed_linear(x, W, b)      the same, summed in another order

Whether it applies is decided from static shapes: the step of a decode, not its prefill. Matrices
stored as [d, n] (``Conv1D``) stay, since their rows do not lie in memory one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from nbl_compiler.lowering.streamed_linear import STREAM_TOKENS, streamed_linear
from nbl_compiler.passes.base import PassReport
from nbl_compiler.passes.graph_tools import argument, example_value, is_call

_LINEAR = frozenset({F.linear, torch._C._nn.linear})
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class StreamProducts:
    """Replace ``linear`` by ``streamed_linear`` where a CPU multiplies a few tokens."""

    name: str = "stream_products"

    def __call__(self, graph_module: GraphModule) -> PassReport:
        count = 0
        for node in graph_module.graph.nodes:
            if is_call(node, _LINEAR) and _streams(node):
                x, weight = argument(node, 0, "input"), argument(node, 1, "weight")
                node.args = (x, weight, argument(node, 2, "bias"))
                node.kwargs = {}
                node.target = streamed_linear
                count += 1
        return PassReport(notes=(f"{count} linear layers streamed",))


def _streams(node: Node) -> bool:
    operands = (argument(node, 0, "input"), argument(node, 1, "weight"))
    if not all(isinstance(operand, Node) for operand in operands):
        return False
    x, weight = (example_value(operand) for operand in operands if isinstance(operand, Node))
    if not isinstance(x, Tensor) or not isinstance(weight, Tensor):
        return False
    sizes = x.shape[:-1]
    return (
        x.device.type == "cpu"
        and x.dtype in _DTYPES
        and weight.dtype == x.dtype
        and weight.ndim == 2
        and weight.stride(-1) == 1
        and all(isinstance(size, int) for size in sizes)
        and 0 < prod(sizes) <= STREAM_TOKENS
    )
