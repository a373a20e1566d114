"""The front of plans, as a table, a plot, and the plan that a budget picks from it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from rich.table import Table

from nbl_compiler.errors import ConfigError, NBLWarning
from nbl_compiler.planning.budget import Budget
from nbl_compiler.planning.search import Choice
from nbl_compiler.plans import Plan
from nbl_compiler.report import render


@dataclass(frozen=True)
class Point:
    """One plan of the front.

    Args:
        loss: Relative increase of perplexity on the trial text, e^(nats) − 1, where nats is the
            divergence of the next-token distribution from the dense model's; for a model that
            predicts no tokens, the relative squared error of its output.
        speedup: Predicted, over the dense model compiled by Inductor.
        choices: Site → name of its setting; other sites are dense.
        bytes_saved: Parameters' bytes that a token reads less, at 4 bytes each.
    """

    loss: float
    speedup: float
    choices: dict[str, str]
    bytes_saved: int

    def summary(self) -> str:
        """Return how many sites have which setting."""
        names = sorted(set(self.choices.values()))
        counts = (f"{list(self.choices.values()).count(name)} × {name}" for name in names)
        return ", ".join(counts) or "dense"


@dataclass(frozen=True, eq=False)
class Front:
    """What ``nbl.plan`` found. ``print(front)`` shows a table.

    Args:
        points: By rising speed-up; the first is the dense model.
        budget: What was asked for.
        chosen: Index of the point that the budget picks.
        plan: Its plan.
        plan_at: Returns the plan of the point with an index.
        tried: What every setting of every site saves, and what it costs alone.
    """

    points: tuple[Point, ...]
    budget: Budget
    chosen: int
    plan: Plan
    plan_at: Callable[[int], Plan] = field(repr=False)
    tried: tuple[Choice, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        return render(self.table())

    def table(self) -> Table:
        """Return one row a point; the chosen one is marked."""
        table = Table(title=f"plans for {self.budget}", title_justify="left")
        for name in ("", "loss", "speed-up", "MB less a token"):
            table.add_column(name, justify="right")
        table.add_column("sites")
        for index, point in enumerate(self.points):
            table.add_row(
                "→" if index == self.chosen else str(index), f"{point.loss:.2%}",
                f"{point.speedup:.2f}×", f"{point.bytes_saved / 1e6:.1f}", point.summary(),
            )  # fmt: skip
        return table

    def sites_table(self) -> Table:
        """Return one row a site and setting: what it saves, and what it costs alone.

        Linear attention that was never a candidate was tried on text as it is only: on edited text
        it costs at least as much.
        """
        table = Table(title="each site alone", title_justify="left")
        table.add_column("site")
        table.add_column("setting")
        table.add_column("ms less a step", justify="right")
        table.add_column("loss", justify="right")
        for choice in self.tried:
            least = "" if choice.exact else "≥ "
            table.add_row(
                choice.site,
                choice.setting,
                f"{1e3 * choice.seconds:.3f}",
                f"{least}{choice.loss:.4f}",
            )
        return table

    def as_json(self) -> dict[str, Any]:
        """Return everything but the plan's tensors as plain values."""
        return {
            "budget": vars(self.budget),
            "chosen": self.chosen,
            "digest": self.plan.digest,
            "points": [vars(point) for point in self.points],
            "sites": [vars(choice) for choice in self.tried],
        }

    def save_plot(self, path: str | PathLike[str]) -> None:
        """Draw loss against speed-up (the suffix says the format: svg, png, pdf).

        Raises:
            ConfigError: if matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ConfigError(
                "a plot needs matplotlib: `pip install nbl-compiler[bench]`"
            ) from error
        figure = Figure(figsize=(6, 4))
        axes = figure.subplots()
        speed = [point.speedup for point in self.points]
        loss = [100 * point.loss for point in self.points]
        axes.plot(speed, loss, "o-", markersize=4)
        axes.plot(speed[self.chosen], loss[self.chosen], "o", markersize=10, fillstyle="none")
        axes.set_xlabel(
            f"predicted speed-up, {self.budget.phase} at {self.budget.context:,} tokens"
        )
        axes.set_ylabel("loss, % of perplexity")
        axes.set_yscale("symlog", linthresh=1)
        axes.grid(alpha=0.3)
        figure.tight_layout()
        figure.savefig(Path(path))


def pick(points: Sequence[Point], budget: Budget) -> int:
    """Return the index of the point that a budget asks for; points rise in speed-up and loss.

    Where none is fast enough that is the fastest, with a warning: the search is not to be lost.
    """
    if budget.max_loss is not None:
        return max(i for i, point in enumerate(points) if point.loss <= budget.max_loss)
    assert budget.speedup is not None
    fast = [i for i, point in enumerate(points) if point.speedup >= budget.speedup]
    if fast:
        return fast[0]
    best = points[-1]
    warnings.warn(
        f"no plan reaches {budget.speedup:g}× ({budget.phase}, {budget.context:,} tokens, batch "
        f"{budget.batch}); took the fastest, {best.speedup:.2f}× at a loss of {best.loss:.1%}. "
        "Ask for less, or give the planner more settings",
        NBLWarning,
        stacklevel=3,
    )
    return len(points) - 1
