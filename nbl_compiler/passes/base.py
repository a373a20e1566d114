"""What a pass is: a named graph-to-graph step that returns a report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch.fx import GraphModule, Node


@dataclass(frozen=True)
class Rejected:
    """A site that was looked at and left alone, and why.

    Args:
        site: Name of the site.
        kind: ``"attention"`` or ``"ffn"``.
        node: Name of the graph node that decided it.
        reason: One sentence for the user.
        source: The line of the model's code that produced the node, if Dynamo recorded it.
        passed: How many of the matcher's steps went well before; 0 if a plan left the site alone.
    """

    site: str
    kind: Literal["attention", "ffn"]
    node: str
    reason: str
    source: str = ""
    passed: int = 0


@dataclass(frozen=True)
class PassReport:
    """What one pass did to one graph."""

    matched: tuple[str, ...] = ()
    rewritten: tuple[str, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    notes: tuple[str, ...] = ()


@runtime_checkable
class Pass(Protocol):
    """A step of the pipeline. It neither logs, times, dumps nor verifies: the runner does."""

    @property
    def name(self) -> str:
        """Name of the pass in dumps and reports."""

    def __call__(self, graph_module: GraphModule) -> PassReport:
        """Transform ``graph_module`` in place and say what was done."""


def source_line(node: Node) -> str:
    """Return where the model's code made the node, as ``File …, line … | code``, or "".

    Of the frames that Dynamo recorded the last one in a ``modeling_*.py`` is the model's own; the
    ones behind it are transformers' shared attention and activation functions.
    """
    trace = node.meta.get("stack_trace") or node.stack_trace or ""
    lines = [line.strip() for line in trace.splitlines() if line.strip(" ^~\n")]
    starts = [i for i, line in enumerate(lines) if line.startswith("File ")]
    own = [i for i in starts if "/modeling_" in lines[i]]
    if not starts:
        return " | ".join(lines[-2:])
    first = (own or starts)[-1]
    return " | ".join(lines[first : first + 2])
