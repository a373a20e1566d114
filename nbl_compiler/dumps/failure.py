"""The numeric check of a dumped graph: what its lowering computes against what it says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.node import map_aggregate

from nbl_compiler.dumps.compare import holds_inf, holds_nan, largest_error
from nbl_compiler.errors import NBLError
from nbl_compiler.lowering.lower import lower

# What a graph that was cut down, or its lowering, may raise; a TorchDynamoException is the second.
NOT_RUNNABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Failure:
    """What is wrong with a graph.

    Args:
        kind: ``"NaN"`` or ``"Inf"`` in what the graph itself returns; ``"mismatch"`` between the
            numbers that it and its lowering return, ``"structure"`` between the shapes, dtypes,
            integers or places of NaN and Inf; or the name of what was raised while it was lowered
            or ran lowered.
        text: One sentence for the user.
    """

    kind: str
    text: str


@dataclass(frozen=True)
class Check:
    """Runs a graph eagerly and lowered, and says what is wrong.

    Args:
        lowering: ``"inductor"`` or ``"aot_eager"``.
        tolerance: Largest relative error that is rounding (see ``largest_error``).
    """

    lowering: str
    tolerance: float

    def __call__(self, graph_module: GraphModule, inputs: Sequence[Any]) -> Failure | None:
        """Return what is wrong with the graph on these inputs, or None; inputs are not changed."""
        with torch.no_grad():
            eager = graph_module(*copied(inputs))
            for kind, holds in (("NaN", holds_nan), ("Inf", holds_inf)):
                if holds((eager,)) and not holds(inputs) and not _writes(graph_module, kind):
                    return Failure(kind, f"the graph itself returns {kind}, run eagerly")
            try:
                lowered = lower(graph_module, copied(inputs), self.lowering)(*copied(inputs))
            except NBLError:  # no compiler on this machine, say
                raise
            except NOT_RUNNABLE as error:
                name = type(error).__name__
                return Failure(name, f"{self.lowering} raises {name}: {_first_line(error)}")
        error_size = largest_error(eager, lowered)
        if error_size <= self.tolerance:
            return None
        differs = f"{self.lowering} differs from the graph run eagerly"
        if math.isinf(error_size):
            where = "in shapes, dtypes, integers or the places of NaN and Inf"
            return Failure("structure", f"{differs} {where}")
        sizes = f"by {error_size:.2e} (tolerance {self.tolerance:.0e})"
        return Failure("mismatch", f"{differs} {sizes}")


def copied(values: Sequence[Any]) -> list[Any]:
    """Return the values with tensors of their own memory: graphs write into their inputs.

    Not into parameters, which are large and stay as they are.
    """
    written = (isinstance(v, Tensor) and not isinstance(v, nn.Parameter) for v in values)
    return [_copy(v) if may else v for v, may in zip(values, written, strict=True)]


def _copy(tensor: Tensor) -> Tensor:
    if 0 in tensor.stride():  # cloning would fill in what is expanded, and change the strides
        return tensor
    return tensor.detach().clone()


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")


def _writes(graph_module: GraphModule, kind: str) -> bool:
    """Tell whether the graph holds NaN or Inf as a constant, such as the -inf of a mask."""
    test = math.isnan if kind == "NaN" else math.isinf
    found = False

    def look(value: Any) -> Any:
        nonlocal found
        found = found or (isinstance(value, float) and test(value))
        return value

    for node in graph_module.graph.nodes:
        map_aggregate((node.args, node.kwargs), look)
    return found
