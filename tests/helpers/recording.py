"""Catching the graphs that the backend rewrites, on their way to lowering."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch.fx import GraphModule

from nbl_compiler import backend
from nbl_compiler.passes.base import Rejected
from nbl_compiler.passes.sites import load_linearized, load_matches


@contextmanager
def rewritten_graphs() -> Iterator[list[GraphModule]]:
    """Collect every graph that ``backend="nbl"`` hands to lowering."""
    graphs: list[GraphModule] = []
    lower = backend.lower

    def record(graph_module: GraphModule, example_inputs: Sequence[Any], *rest: Any) -> Any:
        graphs.append(graph_module)
        return lower(graph_module, example_inputs, *rest)

    with patch.object(backend, "lower", record):
        yield graphs


def found(graph_module: GraphModule) -> list[str]:
    """Return the names of the sites that matched in one graph."""
    return [match.site for match in load_matches(graph_module).found]


def rewritten(graph_module: GraphModule) -> list[str]:
    """Return the names of the sites that were linearized in one graph."""
    return [match.site for match in load_linearized(graph_module)]


def rejected(graph_module: GraphModule) -> tuple[Rejected, ...]:
    """Return the sites that were rejected in one graph."""
    return load_matches(graph_module).rejected
