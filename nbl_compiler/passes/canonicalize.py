"""Drop dead code, so that matchers see only users that count."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule

from nbl_compiler.passes.base import PassReport
from nbl_compiler.passes.graph_tools import eliminate_dead_code


@dataclass(frozen=True)
class Canonicalize:
    """Eliminate nodes that nothing uses (in-place writes stay)."""

    name: str = "canonicalize"

    def __call__(self, graph_module: GraphModule) -> PassReport:
        return PassReport(notes=(f"{eliminate_dead_code(graph_module)} dead nodes",))
