"""Drop what the rewrites left without a user."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule

from nbl_compiler.passes.base import PassReport
from nbl_compiler.passes.graph_tools import eliminate_dead_code


@dataclass(frozen=True)
class CleanUp:
    """Eliminate dead code: projections, rotary embeddings and masks that no site needs."""

    name: str = "clean_up"

    def __call__(self, graph_module: GraphModule) -> PassReport:
        return PassReport(notes=(f"{eliminate_dead_code(graph_module)} dead nodes",))
