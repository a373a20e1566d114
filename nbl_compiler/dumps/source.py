"""A GraphModule as a Python file that a person reads and Python runs."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch.fx import GraphModule

CLASS = "GraphModule"
# Spellings that FX's code generator takes for granted.
_PRELUDE = {
    "inf": "from math import inf",
    "nan": "from math import nan",
    "device": "from torch import device",
    "NoneType": "NoneType = type(None)",
    "fx_pytree": "import torch.fx._pytree as fx_pytree",
    "pytree": "import torch.utils._pytree as pytree",
}
_OPS = {
    "torch.ops.nbl.guarded_ffn": "import nbl_compiler.lowering.guarded_ffn",
    "torch.ops.nbl.absent_kv": "import nbl_compiler.lowering.absent_kv",
    "torch.ops.nbl.stored_states": "import nbl_compiler.lowering.value_states",
}
_FREES = re.compile(r";  (?:\w+ = )+None$")
_MAIN = """

if __name__ == "__main__":
    from nbl_compiler.dumps.replay import main

    main({name}, __file__, {arguments})
"""


def class_source(graph_module: GraphModule) -> str:
    """Return imports and one class, as ``print_readable`` writes it with an input a line.

    Each node comes behind the line of the model's code that made it.
    """
    names: dict[str, Any] = {}
    body = _class(graph_module, CLASS, names)
    lines = ["import torch", *_imports(names, body)]
    return "\n".join(lines) + f"\n\n\n{body}"


def as_file(code: str, header: Sequence[str], inputs: str, lowering: str = "eager") -> str:
    """Return the text of a dump.

    Args:
        code: What ``class_source`` returned.
        header: Lines of the comment on top.
        inputs: Name of the file beside it that describes the inputs.
        lowering: How the graph is run when the file is executed, unless told otherwise.
    """
    comment = "".join(f"# {' '.join(line.splitlines())}\n" for line in header)
    arguments = f'inputs="{inputs}", lowering="{lowering}"'
    return f"{comment}{code}{_MAIN.format(name=CLASS, arguments=arguments)}"


def without_frees(code: str) -> list[str]:
    """Return the lines of a dump without ``;  x = None``, which says where memory is freed.

    A pass that moves the last use of a value changes that on lines that it did not touch.
    """
    return [_FREES.sub("", line) for line in code.splitlines()]


def _class(graph_module: GraphModule, name: str, names: dict[str, Any]) -> str:
    """Return a class for the module, and inside it one for each module that it calls."""
    written = graph_module.graph.python_code("self", verbose=True, expanded_def=True)
    names.update(written.globals)
    parts = [written.src.strip("\n")]
    for child_name, child in graph_module.named_children():
        if isinstance(child, GraphModule):
            parts.append(_class(child, child_name, names))
    lines = "\n\n".join(parts).splitlines()
    body = "\n".join(f"    {line}".rstrip() for line in lines)
    return f"class {name}(torch.nn.Module):\n{body}"


def _imports(names: Mapping[str, Any], body: str) -> list[str]:
    used = set(re.findall(r"[A-Za-z_]\w*", re.sub("#.*", "", body)))
    lines = [line for name, line in _PRELUDE.items() if name in used]
    lines += [line for op, line in _OPS.items() if f"{op}." in body]
    for name, value in names.items():
        if name not in _PRELUDE and name != "torch" and name in used:
            lines += _import_of(name, value)
    return sorted(lines)


def _import_of(name: str, value: Any) -> list[str]:
    module = str(getattr(value, "__module__", None))
    attribute = str(getattr(value, "__qualname__", None) or getattr(value, "__name__", ""))
    if module == "builtins":
        return []
    if not _found(module, attribute, value):
        return [f"# {name} cannot be imported ({value!r}): this file cannot run"]
    return [f"from {module} import {attribute} as {name}"]


def _found(module: str, attribute: str, value: Any) -> bool:
    if module == "__main__":  # which is another module wherever the file is executed
        return False
    try:
        return getattr(importlib.import_module(module), attribute, None) is value
    except ImportError:
        return False
