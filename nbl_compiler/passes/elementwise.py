"""Elementwise calls in FX graphs: what they are, what they read, and walks over them."""

from __future__ import annotations

import heapq
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from nbl_compiler.passes.graph_tools import (
    Topology,
    example_value,
    is_active_dropout,
    is_call,
    is_cast,
    is_floating,
    is_weight,
    is_write,
    shape_of,
)

_NONLINEAR = (
    *("gelu", "silu", "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "mish", "softplus"),
    *("softsign", "hardswish", "hardsigmoid", "hardtanh", "logsigmoid", "tanhshrink", "tanh"),
    *("sigmoid", "expit", "erf", "erfc", "exp", "expm1", "log1p", "threshold", "prelu", "ndtr"),
    *("clamp", "clip", "clamp_min", "clamp_max", "maximum", "minimum", "max", "min", "where"),
)
_ARITHMETIC = (
    *("add", "sub", "mul", "multiply", "div", "truediv", "true_divide", "neg", "negative", "pow"),
    *("square", "sqrt", "rsqrt", "reciprocal", "abs", "rsub", "zeros_like", "ones_like"),
    *("gt", "lt", "ge", "le"),
)
_NAMESPACES = (torch, F, torch._C._nn, torch.special, operator)


def _functions(names: Iterable[str]) -> dict[object, Callable[..., Any]]:
    """Map every spelling of the named functions, in-place ones too, to one without side effect."""
    table: dict[object, Callable[..., Any]] = {}
    for name in names:
        for namespace in _NAMESPACES:
            function = getattr(namespace, name, None)
            if function is None:
                continue
            in_place = f"i{name}" if namespace is operator else f"{name}_"
            table[function] = table[getattr(namespace, in_place, function)] = function
    return table


_NONLINEAR_FUNCTIONS = _functions(_NONLINEAR)
_FUNCTIONS = _NONLINEAR_FUNCTIONS | _functions(_ARITHMETIC)
_METHODS = frozenset(n for n in _NONLINEAR + _ARITHMETIC if hasattr(Tensor, n))
_PRODUCTS = frozenset(_functions(("mul", "multiply")))
_PRODUCT_METHODS = frozenset({"mul", "mul_", "multiply", "multiply_"})
_RESHAPES = frozenset(
    {"view", "reshape", "contiguous", "flatten", "unflatten", "squeeze", "unsqueeze", "clone"}
    | {"detach", "view_as", "reshape_as"}
)
_RESHAPE_FUNCTIONS = frozenset(
    {torch.reshape, torch.flatten, torch.unflatten, torch.squeeze, torch.unsqueeze, torch.clone}
)
_FEWEST_OPERANDS = {"max": 2, "min": 2, "where": 3}  # with fewer they are something else
_NO_VALUES = frozenset({"dtype", "device", "layout", "memory_format", "pin_memory", "inplace"})


def passed_through(node: Node) -> Node | None:
    """Return the tensor that a node hands on as it is, row by row; None if it does more.

    Reshapes that keep the last dimension, casts, dropout that is off and multiplication by 1.
    """
    if is_product(node):
        tensors = node.all_input_nodes
        one = len(tensors) == 1 and any(type(a) in (int, float) and a == 1 for a in node.args)
        return tensors[0] if one else None
    source = node.args[0] if node.args else None
    if not isinstance(source, Node):
        return None
    if is_call(node, {F.dropout, torch.dropout}):
        return None if is_active_dropout(node) else source
    if is_cast(node):
        return source if is_floating(node) and is_floating(source) else None
    if is_call(node, _RESHAPE_FUNCTIONS, _RESHAPES):
        before, after = shape_of(source), shape_of(node)
        same = before and after and before[-1] == after[-1] and _dtype(source) == _dtype(node)
        return source if same else None
    return None


def skip_passes(node: Node) -> Node:
    """Walk back to the tensor whose values ``node`` hands on."""
    while (source := passed_through(node)) is not None:
        node = source
    return node


def is_product(node: Node) -> bool:
    """Tell whether the node multiplies elementwise."""
    return is_call(node, _PRODUCTS, _PRODUCT_METHODS)


def is_nonlinear(node: Node) -> bool:
    """Tell whether the node is an elementwise call that can make an activation nonlinear."""
    return elementwise_name(node) in _NONLINEAR


def elementwise_name(node: Node) -> str:
    """Return the name of the elementwise function that the node calls, or an empty string."""
    if node.op == "call_function" and node.target in _FUNCTIONS:
        name = _NAMES[_FUNCTIONS[node.target]]
    elif node.op == "call_method" and str(node.target).rstrip("_") in _METHODS:
        name = str(node.target).rstrip("_")
    else:
        return ""
    operands = [a for a in node.args if name == "where" or isinstance(a, Node)]
    few = len(operands) + len(node.kwargs) < _FEWEST_OPERANDS.get(name, 0)
    return "" if few or "out" in node.kwargs else name


_NAMES = {
    function: name for name in _NONLINEAR + _ARITHMETIC for function in _functions((name,)).values()
}


def run_elementwise(node: Node, values: Mapping[Node, Tensor]) -> Tensor:
    """Run an elementwise call with ``values`` in place of its input nodes, in their dtype."""
    options = {name: value for name, value in node.kwargs.items() if name not in _NO_VALUES}
    args, kwargs = torch.fx.map_arg((node.args, options), values.__getitem__)
    if node.op == "call_function":
        result = _FUNCTIONS[node.target](*args, **kwargs)
    else:
        result = getattr(Tensor, elementwise_name(node))(*args, **kwargs)
    assert isinstance(result, Tensor)
    return result


def reads_metadata(node: Node) -> bool:
    """Tell whether the node only asks for a tensor's shape or dtype."""
    asks = is_call(node, {getattr, torch.ops.aten.sym_size.int}, {"size", "numel", "dim", "stride"})
    return asks and not isinstance(example_value(node), Tensor)


class ValueFlow:
    """Which values of one graph the nodes compute with, and walks over elementwise calls."""

    def __init__(self, graph_module: GraphModule, topology: Topology) -> None:
        self.position = topology.position
        self.constants: set[Node] = set()
        for node in graph_module.graph.nodes:
            if self._is_constant(node):
                self.constants.add(node)

    def _is_constant(self, node: Node) -> bool:
        """Tell whether the node is the same for every input: a weight, a number, made of such."""
        if node.op in ("placeholder", "get_attr"):
            return is_weight(node) or shape_of(node) == ()
        return node.op.startswith("call") and all(n in self.constants for n in node.all_input_nodes)

    def inputs(self, node: Node) -> list[Node]:
        """Return the nodes, constants aside, whose values the node computes with."""
        source = passed_through(node)
        nodes = node.all_input_nodes if source is None else [source]
        return [n for n in nodes if n not in self.constants]

    def is_elementwise(self, node: Node) -> bool:
        """Tell whether the node is a pure function of its inputs, element by element."""
        if passed_through(node) is not None:
            return True
        return bool(elementwise_name(node)) and (not is_write(node) or _is_sole_reader(node))

    def grow(self, sources: Iterable[Node]) -> list[Node]:
        """Return the elementwise calls that depend on ``sources`` alone, in graph order."""
        inside = set(sources)
        grown: list[Node] = []
        for node in self.following(inside):
            if self.is_elementwise(node) and all(n in inside for n in self.inputs(node)):
                inside.add(node)
                grown.append(node)
        return grown

    def following(self, inside: set[Node]) -> Iterator[Node]:
        """Yield the readers of ``inside`` in graph order; it may grow meanwhile."""
        queue: list[tuple[int, Node]] = []
        read: set[Node] = set()
        seen: set[Node] = set()
        while True:
            for user in [user for node in inside - read for user in node.users]:
                if user not in seen and user.op != "output":
                    seen.add(user)
                    heapq.heappush(queue, (self.position[user], user))
            read |= inside
            if not queue:
                return
            yield heapq.heappop(queue)[1]

    def roots(self, start: Node, is_source: Callable[[Node], bool]) -> list[Node]:
        """Walk back over elementwise calls to the values that ``start`` is a function of.

        The walk ends at nodes that ``is_source`` accepts, elementwise or not.
        """
        found: set[Node] = set()
        seen: set[Node] = set()
        stack = [start]
        while stack:
            node = skip_passes(stack.pop())
            if node in seen or node in self.constants:
                continue
            seen.add(node)
            if self.is_elementwise(node) and not is_source(node):
                stack.extend(self.inputs(node))
            else:
                found.add(node)
        return sorted(found, key=self.position.__getitem__)


def _is_sole_reader(node: Node) -> bool:
    """Tell whether an in-place call is the only one to see the memory it writes."""
    source = node.args[0] if node.args else None
    while isinstance(source, Node):
        if len(source.users) > 1:
            return False
        source = None if is_cast(source) else passed_through(source)
    return True


def _dtype(node: Node) -> torch.dtype | None:
    value = example_value(node)
    return value.dtype if isinstance(value, Tensor) else None
