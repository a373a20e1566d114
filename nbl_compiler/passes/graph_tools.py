"""Reading an FX graph as Dynamo writes it: ops by meaning, module paths, and cones.

Dynamo's graphs are not functional: a static KV cache is written by ``index_copy_`` and then read
through the same placeholder. So every walk here follows *writers* too: the value of a tensor
depends on whatever was written into it.
"""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from sympy import Expr
from torch.fx import GraphModule, Node

_IN_PLACE_OPERATORS = frozenset(
    {operator.setitem, operator.delitem, operator.iadd, operator.isub, operator.imul}
    | {operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow, operator.iand}
    | {operator.ior, operator.ixor, operator.ilshift, operator.irshift, operator.imatmul}
)
# Spelled like writes, because the plain names are keywords of Python.
_KEYWORD_OPERATORS = frozenset({operator.and_, operator.or_, operator.not_, operator.is_})
_IN_PLACE_METHODS = frozenset(f"__{function.__name__}__" for function in _IN_PLACE_OPERATORS)
_VIEW_METHODS = frozenset(
    {"view", "reshape", "transpose", "permute", "contiguous", "unsqueeze", "squeeze", "expand"}
    | {"flatten", "unflatten", "swapaxes", "swapdims", "movedim", "t", "narrow", "select", "detach"}
    | {"view_as", "expand_as", "reshape_as", "chunk", "split", "tensor_split", "unbind"}
    | {"split_with_sizes", "__getitem__"}
)
_VIEW_FUNCTIONS = frozenset(
    {operator.getitem, torch.transpose, torch.reshape, torch.permute, torch.unsqueeze}
    | {torch.squeeze, torch.flatten, torch.unflatten, torch.swapaxes, torch.swapdims, torch.t}
    | {torch.movedim, torch.narrow, torch.select, torch.chunk, torch.split, torch.tensor_split}
    | {torch.unbind, torch.view_as_real, torch.view_as_complex}
)
_CAST_METHODS = frozenset({"to", "float", "half", "bfloat16", "type", "type_as", "double"})
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat)
_PATH_PART = re.compile(r"\['([^']*)'\]|\[(\d+)\]|\.?([A-Za-z0-9_]+)")
_DROPPED_PARTS = frozenset({"_modules", "_orig_mod", "__self__", "_parameters"})


def example_value(node: Node) -> object:
    """Return what Dynamo recorded as the node's value: a fake tensor, a SymInt, or None."""
    return node.meta.get("example_value", node.meta.get("val"))


def traced_size(size: object) -> int:
    """Return a size as it was while Dynamo traced; ``int()`` would make Dynamo guard on it.

    A size that nobody knew then (one that depends on data) counts as 1.
    """
    if isinstance(size, torch.SymInt):
        return 1 if size.node.hint is None else int(size.node.hint)
    return int(size)  # type: ignore[call-overload,no-any-return]


def shape_of(node: Node) -> tuple[int | Expr, ...] | None:
    """Return the shape of the node's tensor, or None.

    A symbolic size is given as its expression: comparing two ``SymInt``s would make Dynamo guard on
    the answer, and compile again for the next shape.
    """
    value = example_value(node)
    if not isinstance(value, torch.Tensor):
        return None
    return tuple(s.node.expr if isinstance(s, torch.SymInt) else int(s) for s in value.shape)


def is_floating(node: Node) -> bool:
    """Tell whether the node holds a floating-point tensor."""
    value = example_value(node)
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def is_weight(node: object) -> bool:
    """Tell whether a node is a model parameter (a graph input, or an attribute of the module)."""
    if not isinstance(node, Node):
        return False
    if node.op == "get_attr":
        value: object = node.graph.owning_module
        for part in str(node.target).split("."):
            value = getattr(value, part, None)
        return isinstance(value, torch.nn.Parameter)
    return node.op == "placeholder" and isinstance(example_value(node), torch.nn.Parameter)


def weight_behind(node: object) -> Node | None:
    """Return the parameter that the node is, or is a view or cast of (``W.T``), or None."""
    while isinstance(node, Node) and not is_weight(node):
        node = argument(node, 0, "input") if is_view(node) else None
    return node if isinstance(node, Node) else None


def module_path(node: Node) -> str:
    """Return the dotted path of the module whose code made the node, or an empty string.

    ``L['self'].model.layers.0.self_attn`` becomes ``model.layers.0.self_attn``, whichever way
    the model was compiled (``torch.compile(model)``, its ``forward``, a wrapper).
    """
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    return normalize_path(next(reversed(stack.values()))[0])


def normalize_path(path: str) -> str:
    """Strip Dynamo's spelling of a module path down to the dotted path users write."""
    path = re.sub(r"^[LG]\['[^']*'\]", "", path)
    parts = ["".join(groups) for groups in _PATH_PART.findall(path)]
    return ".".join(part for part in parts if part and part not in _DROPPED_PARTS)


def common_module(nodes: Iterable[Node]) -> str:
    """Return the deepest module path that contains every node that has one."""
    paths = [path.split(".") for path in map(module_path, nodes) if path]
    if not paths:
        return ""
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def is_call(
    node: object, functions: Collection[object] = (), methods: Collection[object] = ()
) -> bool:
    """Tell whether the node calls one of the functions or methods."""
    if not isinstance(node, Node):
        return False
    if node.op == "call_function":
        return node.target in functions
    return node.op == "call_method" and node.target in methods


def is_addition(node: object) -> bool:
    """Tell whether the node adds, in any spelling, in place or not."""
    return is_call(node, {operator.add, operator.iadd, torch.add}, {"add", "add_"})


def argument(node: Node, position: int, name: str, default: object = None) -> object:
    """Return an argument given by position or by name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def is_view(node: object) -> bool:
    """Tell whether the node only rearranges, slices or casts one tensor."""
    if isinstance(node, Node) and is_call(node, {getattr}):
        return argument(node, 1, "name") in {"T", "mT", "H"}
    return is_call(node, _VIEW_FUNCTIONS, _VIEW_METHODS) or is_cast(node)


def is_cast(node: object) -> bool:
    """Tell whether the node converts one tensor to another dtype or device.

    So does one that takes this process's part of a tensor-parallel weight.
    """
    if is_call(node, (), {"to_local"}):
        assert isinstance(node, Node)
        return is_weight(node.args[0])
    return is_call(node, (), _CAST_METHODS)


def is_write(node: Node) -> bool:
    """Tell whether the node writes into one of its arguments in place."""
    return _write_target(node) is not None


def written(write: Node) -> Node:
    """Return the node that an in-place write was called on."""
    target = _write_target(write)
    assert target is not None
    return target


def _write_target(node: Node) -> Node | None:
    """Return the argument that the node writes into, or None.

    In-place ops are spelled ``x.add_(y)``, ``torch.add(x, y, out=z)``, ``F.relu(x, inplace=True)``,
    ``x[i] = y`` and ``x += y``.
    """
    if node.op not in ("call_function", "call_method"):
        return None
    out = node.kwargs.get("out")
    if isinstance(out, Node):
        return out
    target = argument(node, 0, "input")
    if not isinstance(target, Node):
        return None
    if node.target in _IN_PLACE_OPERATORS or node.target in _IN_PLACE_METHODS:
        is_number = isinstance(example_value(target), _NUMBERS)  # which ``+=`` makes anew
        return None if is_number else target
    if node.target in _KEYWORD_OPERATORS:
        return None
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        return target
    return target if _asks_for_in_place(node) else None


def _asks_for_in_place(node: Node) -> bool:
    """Tell whether a function such as ``F.relu`` is called with ``inplace=True``."""
    if node.op != "call_function" or not callable(node.target):
        return False
    position = _in_place_position(node.target)
    return position is not None and bool(argument(node, position, "inplace", False))


@lru_cache(maxsize=4096)
def _in_place_position(function: Callable[..., object]) -> int | None:
    """Return the position of the function's ``inplace`` parameter, or None."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a builtin without a signature
        return None
    return names.index("inplace") if "inplace" in names else None


def has_effect(node: Node) -> bool:
    """Tell whether the node does something besides computing a value.

    FX's own notion of purity overlooks methods such as ``index_copy_``, by which a static KV cache
    and its length counter are updated, and calls for their effect alone, which have no value:
    entering and leaving ``vmap``, say.
    """
    calls = node.op in ("call_function", "call_method")
    return node.is_impure() or is_write(node) or (calls and example_value(node) is None)


def eliminate_dead_code(graph_module: GraphModule) -> int:
    """Erase nodes without users that compute a value and do nothing else; return how many went."""
    before = len(graph_module.graph.nodes)
    graph_module.graph.eliminate_dead_code(has_effect)
    return before - len(graph_module.graph.nodes)


def is_active_dropout(node: Node) -> bool:
    """Tell whether the node is a dropout that drops something when it runs."""
    if is_call(node, {F.dropout, torch.dropout}):
        p, training = argument(node, 1, "p", 0.5), argument(node, 2, "training", True)
        return bool(training) and p != 0.0
    return False


def projection_input(node: Node) -> Node | None:
    """Return the activation that a projection reads, or None if the node is no projection.

    A projection multiplies one activation by a model parameter: ``F.linear(x, W, b)``,
    ``torch.addmm(b, x, W)`` (GPT-2's ``Conv1D``), ``x @ W`` or ``matmul(x, W)``.
    """
    if is_call(node, {F.linear, torch._C._nn.linear}):
        source, weight = argument(node, 0, "input"), argument(node, 1, "weight")
    elif is_call(node, {torch.addmm}, {"addmm"}):
        source, weight = argument(node, 1, "mat1"), argument(node, 2, "mat2")
    elif is_call(node, {torch.matmul, torch.mm, operator.matmul}, {"matmul", "mm"}):
        source, weight = argument(node, 0, "input"), argument(node, 1, "other")
    else:
        return None
    if not isinstance(source, Node) or is_weight(source):
        return None
    return None if weight_behind(weight) is None else source


def skip_views_back(node: Node) -> Node:
    """Walk back over views of one tensor that keep its last dimension, to that tensor."""
    while is_call(node, (), {"view", "reshape", "contiguous"}):
        source = node.args[0]
        if not isinstance(source, Node):
            break
        before, after = shape_of(source), shape_of(node)
        if before is None or after is None or before[-1] != after[-1]:
            break
        node = source
    return node


class Topology:
    """Positions and writers of one graph, computed once per match."""

    def __init__(self, graph_module: GraphModule) -> None:
        self.position = {node: i for i, node in enumerate(graph_module.graph.nodes)}
        self.writers: dict[Node, list[Node]] = {}
        for node in self.position:
            if is_write(node):
                self.writers.setdefault(self.storage(written(node)), []).append(node)

    def settled(self, node: Node) -> int:
        """Return the position from which on the node's memory is no longer written."""
        writers = self.writers.get(self.storage(node), ())
        return max(self.position[n] for n in (node, *writers))

    def storage(self, node: Node) -> Node:
        """Return the node that owns the memory a view or an in-place result looks into."""
        while True:
            source: object = _write_target(node)
            if source is None and is_view(node) and not is_cast(node):
                source = argument(node, 0, "input")
            if not isinstance(source, Node):
                return node
            node = source

    def sources(self, node: Node) -> Iterator[Node]:
        """Yield the nodes whose values the node's value depends on, writers included."""
        yield from node.all_input_nodes
        yield from (w for w in self.writers.get(node, ()) if w is not node)

    def backward(self, start: Node, stop: Callable[[Node], bool]) -> list[Node]:
        """Return the cone behind ``start`` (itself included), not looking behind ``stop`` nodes."""
        seen: dict[Node, None] = {}
        stack = [start]
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen[node] = None
            if node is start or not stop(node):
                stack.extend(self.sources(node))
        return sorted(seen, key=self.position.__getitem__)

    def forward(self, start: Node) -> set[Node]:
        """Return every node whose value depends on ``start``, through writes as well."""
        seen = {start}
        stack = [start]
        while stack:
            node = stack.pop()
            reached = list(node.users)
            if is_write(node):
                reached.append(self.storage(node))
            for user in reached:
                if user not in seen:
                    seen.add(user)
                    stack.append(user)
        return seen
