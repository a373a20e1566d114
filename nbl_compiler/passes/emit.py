"""Writing nodes that carry example values, as Dynamo's own nodes do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from nbl_compiler.lowering.guarded_site import QUICK_GELU_SLOPE
from nbl_compiler.passes.graph_tools import example_value
from nbl_compiler.passes.lifting import is_lifted


class Emitter:
    """Adds call nodes at the graph's insertion point.

    Args:
        graph: Where to.
        meta: What every new node carries besides its example value.
    """

    def __init__(self, graph: Graph, meta: Mapping[str, Any]) -> None:
        self._graph = graph
        self._meta = {k: v for k, v in meta.items() if k not in ("example_value", "val")}

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """Add ``target(*args, **kwargs)``."""
        node = self._graph.call_function(target, args, kwargs)
        mode = next((m for n in node.all_input_nodes if (m := _mode_of(n)) is not None), None)
        values: Any = map_arg((args, kwargs), lambda n: _value_in(mode, n))  # type: ignore[arg-type,return-value]
        # As in Dynamo: without the Python dispatcher, some kernels make symbolic sizes constants.
        with enable_python_dispatcher(), mode or nullcontext(), torch.no_grad():
            value = target(*values[0], **values[1])
        node.meta.update(self._meta)
        if value is not None:
            node.meta["example_value"] = value
        return node

    def activation(self, name: str, z: Node) -> Node:
        """Add σ(z) by its name in ``nbl_compiler.solvers.activations``."""
        if name == "gelu":
            return self.call(F.gelu, z)
        if name == "gelu_tanh":
            return self.call(F.gelu, z, approximate="tanh")
        if name == "quick_gelu":
            return self.call(torch.mul, z, self.call(torch.sigmoid, self.scaled(z)))
        if name == "silu":
            return self.call(F.silu, z)
        positive = self.call(F.relu, z)
        return positive if name == "relu" else self.call(torch.mul, positive, positive)

    def scaled(self, z: Node) -> Node:
        """Add QuickGELU's 1.702 z."""
        return self.call(torch.mul, z, QUICK_GELU_SLOPE)


def _mode_of(node: Node) -> FakeTensorMode | None:
    """The mode of a node's fake value, if it is one that Dynamo traced."""
    value = example_value(node)
    return value.fake_mode if isinstance(value, FakeTensor) and not is_lifted(node) else None


def _value_in(mode: FakeTensorMode | None, node: Node) -> object:
    """A node's value; lifted tensors live in the mode of the lowering and are described anew."""
    value = example_value(node)
    if mode is None or not isinstance(value, FakeTensor) or value.fake_mode is mode:
        return value
    with mode:
        return torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device=value.device
        )
