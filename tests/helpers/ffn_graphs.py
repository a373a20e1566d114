"""Graphs as the passes get them, and FFNs rebuilt in float64 from nothing but their match."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from nbl_compiler.passes.base import Rejected
from nbl_compiler.passes.canonicalize import Canonicalize
from nbl_compiler.passes.ffn_sites import FFNMatch, FFNMatches, Projection
from nbl_compiler.passes.match_attention import MatchAttention
from nbl_compiler.passes.match_ffn import match_ffn
from nbl_compiler.passes.private_copy import private_copy

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "silu": F.silu,
    "relu": F.relu,
    "relu2": lambda z: F.relu(z) ** 2,
}


@dataclass(frozen=True)
class Trace:
    """One of Dynamo's graphs, canonicalized, with the inputs it was called with."""

    graph: GraphModule
    inputs: tuple[Any, ...]


def trace(call: Callable[..., Any], *args: Any, dynamic: bool | None = None, **kwargs: Any) -> Any:
    """Return the traces of one call, in the order of their compilation."""
    traces: list[Trace] = []

    def record(graph_module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        copy = private_copy(graph_module)
        Canonicalize()(copy)
        traces.append(Trace(copy, tuple(inputs)))
        return graph_module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(call, backend=record, dynamic=dynamic)(*args, **kwargs)
    return traces


def matches_of(call: Callable[..., Any], *args: Any, **kwargs: Any) -> FFNMatches:
    """Return what matches in a call that compiles to one graph."""
    (only,) = trace(call, *args, **kwargs)
    MatchAttention()(only.graph)
    return match_ffn(only.graph)


def refusal_of(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Rejected:
    """Return the one rejected site of a call in which nothing matches."""
    matches = matches_of(call, *args, **kwargs)
    assert matches.found == ()
    (refusal,) = matches.rejected
    assert refusal.kind == "ffn"
    return refusal


def values_of(traced: Trace, nodes: Collection[Node]) -> dict[Node, Tensor]:
    """Run a trace and return the values of some nodes, as they were when they were computed."""
    values: dict[Node, Tensor] = {}

    class Recorder(Interpreter):
        def run_node(self, n: Node) -> Any:
            result = super().run_node(n)
            if n in nodes:
                values[n] = result.detach().clone()  # Falcon adds to the output in place
            return result

    with torch.no_grad():
        Recorder(traced.graph).run(*traced.inputs)
    return values


def rebuilt_and_actual(traced: Trace, match: FFNMatch) -> tuple[Tensor, Tensor]:
    """Return (y rebuilt in float64 from the match, y as the trace computes it), both [..., d]."""
    values = values_of(traced, {match.hidden, match.output, *match.weights})

    def apply(projection: Projection, x: Tensor) -> Tensor:
        weight = values[projection.weight].double()
        weight = weight.T if projection.transposed else weight
        bias = None if projection.bias is None else values[projection.bias].double()
        y = F.linear(x, weight, bias)
        return y if projection.rows is None else y[..., slice(*projection.rows)]

    x = values[match.hidden].double()
    act = ACTIVATIONS[match.activation]
    if match.gate is None:
        z = act(apply(match.up, x))
    else:
        z = act(apply(match.gate, x)) * apply(match.up, x)
    return apply(match.down, z), values[match.output]
