"""Tying compiled code to the model it was compiled for.

Dynamo passes weights to a graph as inputs, so it runs one model's compiled code for any other
model of the same class and shapes. For a graph that holds a plan's maps, or that was compiled
without a plan because none was attached to *this* model, that would be a silent wrong answer.
"""

from __future__ import annotations

from types import CodeType
from typing import Any

from torch import nn
from torch.fx import GraphModule

from nbl_compiler.passes.graph_tools import is_weight


def _translator() -> Any:
    """Return Dynamo's translator of the frame being compiled, or None outside Dynamo."""
    from torch._dynamo.symbolic_convert import tls

    return getattr(tls, "current_tx", None)


def guard_on_weights(graph_module: GraphModule) -> None:
    """Make the code that is being compiled run for these very parameters only."""
    from torch._dynamo.guards import GuardBuilder, install_guard
    from torch._dynamo.source import LocalSource
    from torch._guards import ChainedSource, Source

    translator = _translator()
    if translator is None:  # called outside Dynamo: nothing is cached, so nothing is reused
        return
    sources: dict[Source, None] = {}
    for node in graph_module.graph.find_nodes(op="placeholder"):
        source = getattr(node, "_dynamo_source", None)
        if source is not None and is_weight(node):
            sources[source] = None
            # Dynamo counts recompilations per module whose identity is guarded, not per class.
            root = source
            while isinstance(root, ChainedSource):
                root = root.base
            if isinstance(root, LocalSource) and _is_module(translator, root.local_name):
                sources[root] = None
    install_guard(*(source.make_guard(GuardBuilder.ID_MATCH) for source in sources))


def _is_module(translator: Any, name: str) -> bool:
    return isinstance(translator.output.root_tx.f_locals.get(name), nn.Module)


def code_being_compiled() -> CodeType | None:
    """Return the code object whose frame Dynamo is compiling, or None outside Dynamo."""
    translator = _translator()
    code = None if translator is None else translator.output.root_tx.f_code
    return code if isinstance(code, CodeType) else None
