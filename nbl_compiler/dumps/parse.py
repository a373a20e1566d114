"""Reading a dumped file back as an FX graph, without executing it.

FX writes a graph as straight-line code, one statement a node, so the statements say all there is.
Tracing the class instead would execute whatever does not depend on an input (``arange``, entering
``vmap``) and lose in-place writes.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import math
import operator
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from nbl_compiler.dumps.inputs import read_inputs
from nbl_compiler.dumps.source import CLASS
from nbl_compiler.errors import ConfigError

_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
    ast.Pow: operator.pow, ast.LShift: operator.lshift, ast.RShift: operator.rshift,
    ast.BitAnd: operator.and_, ast.BitOr: operator.or_, ast.BitXor: operator.xor,
    ast.MatMult: operator.matmul, ast.Eq: operator.eq, ast.NotEq: operator.ne,
    ast.Lt: operator.lt, ast.Gt: operator.gt, ast.LtE: operator.le, ast.GtE: operator.ge,
    ast.UAdd: operator.pos, ast.USub: operator.neg, ast.Invert: operator.invert,
}  # fmt: skip
_IN_PLACE: dict[type, Callable[..., Any]] = {
    ast.Add: operator.iadd, ast.Sub: operator.isub, ast.Mult: operator.imul,
    ast.Div: operator.itruediv, ast.FloorDiv: operator.ifloordiv, ast.Mod: operator.imod,
    ast.Pow: operator.ipow, ast.LShift: operator.ilshift, ast.RShift: operator.irshift,
    ast.BitAnd: operator.iand, ast.BitOr: operator.ior, ast.BitXor: operator.ixor,
    ast.MatMult: operator.imatmul,
}  # fmt: skip
_SOURCE = re.compile(r"\s*# File: (?P<file>.+):(?P<line>\d+) in (?P<name>.+?), code: (?P<code>.*)")
# What reading a file may raise, whatever is in it.
_NO_GRAPH = (
    *(SyntaxError, ImportError, ValueError, LookupError, AttributeError, TypeError),
    *(AssertionError, RuntimeError, StopIteration),
)
_NAMES = {"inf": math.inf, "nan": math.nan, "torch": torch, "device": torch.device}


def load_graph(file: Path, inputs: Path) -> tuple[GraphModule, list[Any]]:
    """Return a dumped file's graph and the values it is run on, one per graph input.

    Args:
        file: A file that ``as_file`` wrote.
        inputs: The file of inputs beside it.

    Raises:
        ConfigError: if the file is no dump, or its inputs are missing.
    """
    values, own = read_inputs(inputs)
    graph_module = parse(file.read_text("utf-8"), str(file))
    for name, tensor in own.items():
        path, _, last = name.rpartition(".")
        graph_module.get_submodule(path).register_buffer(last, tensor, persistent=False)
    names = [str(node.target) for node in graph_module.graph.find_nodes(op="placeholder")]
    missing = [name for name in names if name not in values]
    if missing:
        raise ConfigError(f"{inputs} says nothing about the input {missing[0]} of {file.name}")
    return graph_module, [values[name] for name in names]


def parse(text: str, origin: str) -> GraphModule:
    """Return the graph of a dumped file's text.

    Args:
        text: The file's content.
        origin: Its name, for error messages.

    Raises:
        ConfigError: if the text is no dumped graph.
    """
    try:
        tree = ast.parse(text)
        names = dict(_NAMES)
        for statement in tree.body:
            names.update(_imported(statement))
        (top,) = [s for s in tree.body if isinstance(s, ast.ClassDef) and s.name == CLASS]
        return _Reader(top, names, text.splitlines()).graph_module
    except _NO_GRAPH as error:
        raise ConfigError(f"{origin} is no dumped graph ({error})") from error


def _imported(statement: ast.stmt) -> dict[str, Any]:
    if isinstance(statement, ast.ImportFrom) and statement.module != "__future__":
        module = importlib.import_module(str(statement.module))
        return {a.asname or a.name: getattr(module, a.name) for a in statement.names}
    if isinstance(statement, ast.Import):
        modules = {a: importlib.import_module(a.name) for a in statement.names}
        return {a.asname: module for a, module in modules.items() if a.asname}
    return {}


class _Reader:
    """Reads one class into ``graph_module``."""

    def __init__(self, top: ast.ClassDef, names: dict[str, Any], lines: list[str]) -> None:
        self._names = names
        self._lines = lines
        self._graph = Graph()
        self._nodes: dict[str, Any] = {}
        self._source: str | None = None
        self._last_line = top.lineno
        root = nn.Module()
        for inner in top.body:
            if isinstance(inner, ast.ClassDef):
                root.add_module(inner.name, _Reader(inner, names, lines).graph_module)
        (forward,) = [s for s in top.body if isinstance(s, ast.FunctionDef)]
        names = _input_names(forward.body)
        for name in (argument.arg for argument in forward.args.args[1:]):
            self._nodes[name] = self._graph.create_node(
                "placeholder", name, name=names.get(name, name)
            )
        self._statements = iter(forward.body)
        for statement in self._statements:
            self._read(statement)
        self.graph_module: GraphModule = GraphModule(root, self._graph)

    def _read(self, statement: ast.stmt) -> None:
        self._note_source(statement.lineno)
        if isinstance(statement, ast.Return):
            self._graph.output(self._value(statement.value))
        elif isinstance(statement, ast.AugAssign):  # ``x += y;  iadd = x``
            name = self._name_of_write()
            function = _IN_PLACE[type(statement.op)]
            self._nodes[name] = self._call(name, function, statement.target, statement.value)
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            self._assign(statement)
        elif not isinstance(statement, ast.Pass):
            raise ValueError(f"line {statement.lineno}")

    def _assign(self, statement: ast.Assign | ast.AnnAssign) -> None:
        value = statement.value
        if isinstance(value, ast.Constant) and value.value is None:
            return  # ``x = y = None`` frees memory
        target = _target(statement)
        if isinstance(target, ast.Subscript):  # ``x[i] = y;  setitem = x``
            name = self._name_of_write()
            node = self._call(name, operator.setitem, target.value, target.slice, value)
            self._nodes[name] = node
            return
        assert isinstance(target, ast.Name)
        known = self._nodes.get(value.id) if isinstance(value, ast.Name) else None
        self._nodes[target.id] = self._node(target.id, value) if known is None else known

    def _name_of_write(self) -> str:
        """Return the name that the next statement gives to the write in this one."""
        target = _target(next(self._statements))
        assert isinstance(target, ast.Name)
        return target.id

    def _node(self, name: str, value: ast.expr | None) -> Node:
        """Add the node that a right-hand side stands for."""
        if isinstance(value, ast.BinOp):
            return self._call(name, _OPERATORS[type(value.op)], value.left, value.right)
        if isinstance(value, ast.Compare):
            function = _OPERATORS[type(value.ops[0])]
            return self._call(name, function, value.left, value.comparators[0])
        if isinstance(value, ast.UnaryOp):
            return self._call(name, _OPERATORS[type(value.op)], value.operand)
        if isinstance(value, ast.Subscript):
            return self._call(name, operator.getitem, value.value, value.slice)
        if isinstance(value, ast.Attribute):
            path = _path_of_self(value)
            if path is not None:
                return self._add(name, "get_attr", path)
            return self._call(name, getattr, value.value, ast.Constant(value.attr))
        if isinstance(value, ast.Call):
            return self._called(name, value)
        raise ValueError(ast.dump(value) if value is not None else "an empty statement")

    def _called(self, name: str, value: ast.Call) -> Node:
        function = value.func
        args = tuple(self._value(a) for a in value.args)
        kwargs = {str(k.arg): self._value(k.value) for k in value.keywords}
        path = _path_of_self(function)
        if path is not None:
            return self._add(name, "call_module", path, args, kwargs)
        if isinstance(function, ast.Attribute) and self._is_node(function.value):
            args = (self._value(function.value), *args)
            return self._add(name, "call_method", function.attr, args, kwargs)
        return self._add(name, "call_function", self._value(function), args, kwargs)

    def _is_node(self, value: ast.expr) -> bool:
        return isinstance(value, ast.Name) and value.id in self._nodes

    def _call(self, name: str, function: Callable[..., Any], *arguments: ast.expr | None) -> Node:
        args = tuple(self._value(a) for a in arguments)
        return self._add(name, "call_function", function, args)

    def _add(self, name: str, op: str, target: Any, args: Any = (), kwargs: Any = None) -> Node:
        node = self._graph.create_node(op, target, args, kwargs or {}, name)
        if self._source is not None:
            node.meta["stack_trace"] = self._source
        return node

    def _value(self, value: ast.expr | None) -> Any:
        """Return an argument: a node, a constant, or a structure of them."""
        if isinstance(value, ast.Name):
            if value.id in self._nodes:
                return self._nodes[value.id]
            known = self._names
            return known[value.id] if value.id in known else getattr(builtins, value.id)
        if isinstance(value, ast.Tuple):
            return tuple(self._value(item) for item in value.elts)
        if isinstance(value, ast.List):
            return [self._value(item) for item in value.elts]
        if isinstance(value, ast.Dict):
            pairs = zip(value.keys, value.values, strict=True)
            return {self._value(key): self._value(item) for key, item in pairs}
        if isinstance(value, ast.UnaryOp):
            return _OPERATORS[type(value.op)](self._value(value.operand))
        if isinstance(value, ast.Attribute):
            return getattr(self._value(value.value), value.attr)
        if isinstance(value, ast.Call):  # ``device(type='cpu')``, ``slice(None, n, None)``
            args = [self._value(a) for a in value.args]
            kwargs = {str(k.arg): self._value(k.value) for k in value.keywords}
            return self._value(value.func)(*args, **kwargs)
        if isinstance(value, ast.Constant):
            return value.value
        raise ValueError(ast.dump(value) if value is not None else "no value")

    def _note_source(self, line: int) -> None:
        """Keep what the comments above a statement say about the model's code."""
        for text in self._lines[self._last_line : line - 1]:
            found = _SOURCE.fullmatch(text)
            if found:
                self._source = (
                    f'  File "{found["file"]}", line {found["line"]}, in {found["name"]}\n'
                    f"    {found['code']}"
                )
            elif "# No stacktrace found" in text:
                self._source = None
        self._last_line = line


def _input_names(body: list[ast.stmt]) -> dict[str, str]:
    """Return what the graph calls inputs whose argument has another name (``l_x_ = L_x_``)."""
    names: dict[str, str] = {}
    for statement in body:
        if not isinstance(statement, ast.Assign) or not isinstance(statement.value, ast.Name):
            break
        target = _target(statement)
        if not isinstance(target, ast.Name):  # ``x[i] = y``
            break
        names[statement.value.id] = target.id
    return names


def _target(statement: ast.stmt) -> ast.expr:
    if isinstance(statement, ast.AnnAssign):
        return statement.target
    if not isinstance(statement, ast.Assign):
        raise ValueError(f"line {statement.lineno}")
    (target,) = statement.targets
    return target


def _path_of_self(value: ast.expr) -> str | None:
    """Return ``a.b`` for ``self.a.b``, and None for anything else."""
    parts: list[str] = []
    while isinstance(value, ast.Attribute):
        parts.append(value.attr)
        value = value.value
    if isinstance(value, ast.Name) and value.id == "self" and parts:
        return ".".join(reversed(parts))
    return None
