"""What the backend tells about each graph it compiled."""

from __future__ import annotations

from dataclasses import dataclass

from nbl_compiler.cost import Cost
from nbl_compiler.passes.base import Rejected
from nbl_compiler.passes.pipeline import PassRun

REWRITING = ("linearize_attention", "fold_ffn")
"""The passes that put a plan's tensors into the graph."""


@dataclass(frozen=True)
class GraphReport:
    """One compiled graph.

    Args:
        runs: The passes, with their times and reports.
        before: Cost of the graph as Dynamo traced it.
        after: Cost of the graph that was lowered.
    """

    runs: tuple[PassRun, ...]
    before: Cost
    after: Cost

    @property
    def matched(self) -> tuple[str, ...]:
        """Every site that a matcher found."""
        return tuple(site for run in self.runs for site in run.report.matched)

    @property
    def rewritten(self) -> tuple[str, ...]:
        """Every site that was replaced."""
        return tuple(
            site for run in self.runs if run.name in REWRITING for site in run.report.rewritten
        )

    @property
    def rejected(self) -> tuple[Rejected, ...]:
        """Every site that was left alone, with its reason."""
        return tuple(item for run in self.runs for item in run.report.rejected)
