"""``nbl_compiler.monitor``: what guards do and what sites read, while a compiled model runs."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from types import TracebackType

import torch
from rich.table import Table
from torch import Tensor

from nbl_compiler.errors import ConfigError, NBLWarning
from nbl_compiler.guard_counters import GuardCounts
from nbl_compiler.monitoring import watch
from nbl_compiler.monitoring.statistics import InputSums
from nbl_compiler.monitoring.subject import find_subject
from nbl_compiler.monitoring.verdict import MonitorLimits, Seen, SiteTraffic, judge
from nbl_compiler.monitoring.watch import GraphWatch, Subject
from nbl_compiler.plans import Plan, Site
from nbl_compiler.report import render

_NAMED = 3
"""How many sites a warning names."""


def monitor(
    compiled: object,
    *,
    plan: Plan | None = None,
    limits: MonitorLimits | None = None,
    warn: bool = True,
) -> Monitor:
    """Watch a compiled model for as long as a ``with`` block lasts.

    The first call inside compiles a second variant of each graph, which counts; calls outside run
    the variant without counting, and entering again compiles nothing. Every token of the sites'
    inputs counts, padding too: the graphs do not know which tokens are padding.

    Args:
        compiled: What ``torch.compile(model, backend="nbl")`` returned, the model (compiled in
            place, or its ``forward`` replaced), or a plan: then every model that runs it.
        plan: Which plan of the model, if it is compiled with several; found otherwise.
        limits: When a site no longer fits.
        warn: Say at the end, in one ``NBLWarning``, which sites do not fit.

    Raises:
        ConfigError: if this is no compiled model with a plan, or the plan rewrites nothing.
    """
    return Monitor(find_subject(compiled, plan), limits or MonitorLimits(), warn)


@dataclass(frozen=True)
class _Counts:
    """What the graphs had counted at one moment."""

    inputs: dict[tuple[GraphWatch, str], InputSums] = field(default_factory=dict)
    guards: dict[tuple[GraphWatch, str], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, graphs: list[GraphWatch]) -> _Counts:
        """Copy the counts; does not wait for the device."""
        return cls(
            {(g, name): sums.clone() for g in graphs for name, sums in g.inputs.items()},
            {(g, name): counters.clone() for g in graphs for name, counters in g.guards.items()},
        )


class Monitor:
    """The context of :func:`monitor`, and what it found; ``print(m)`` shows a table.

    It can be read inside the block, where it shows what happened so far, and after it. Several
    monitors may run at once, also of one model.
    """

    def __init__(self, subject: Subject, limits: MonitorLimits, warn: bool) -> None:
        self._subject, self._limits, self._warn = subject, limits, warn
        self._running = False
        self._start = _Counts()
        self._end: _Counts | None = None

    def __enter__(self) -> Monitor:
        if self._running:
            raise ConfigError("this monitor is running already; make another with nbl.monitor(...)")
        watch.start(self._subject)
        self._running = True
        self.reset()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end = _Counts.of(self._subject.graphs)
        self._running = False
        watch.stop(self._subject)
        if self._warn and kind is None and self.fits is not True:
            text = self._complaint()
            if text:
                warnings.warn(text, NBLWarning, stacklevel=2)

    def reset(self) -> None:
        """Begin a new window: what was counted so far is forgotten by this monitor."""
        self._start = _Counts.of(self._subject.graphs)
        self._end = None if self._running else self._start

    def report(self) -> tuple[SiteTraffic, ...]:
        """Return one row per rewritten site, in the plan's order; waits for the device."""
        end = self._end or _Counts.of(self._subject.graphs)
        return tuple(
            judge(site, _seen(plan, site, self._start, end), self._limits)
            for plan in self._plans()
            for site in plan.rewritten
        )

    @property
    def fits(self) -> bool | None:
        """Whether every site that can be judged fits; None if no site can."""
        return _fits(self.report())

    @property
    def verdict(self) -> str:
        """One sentence on the plan and the traffic."""
        return _sentence(self.report(), self._limits)

    def __str__(self) -> str:
        rows = self.report()
        table = Table(title=_sentence(rows, self._limits), title_justify="left")
        table.add_column("site", no_wrap=True)
        for name in ("tokens", "shift", "energy", "outliers/token", "dense tokens"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("state")
        for row in rows:
            known = row.shift == row.shift  # not NaN
            guarded = bool(row.outliers or row.dense_tokens)
            table.add_row(
                row.site, f"{row.tokens:,}",
                f"{row.shift:.3f}" if known else "-", f"{row.energy:.3f}" if known else "-",
                f"{row.outliers_per_token:.1f}" if guarded else "-",
                f"{row.dense_share:.1%}" if guarded else "-",
                f"{row.state}: {row.reason}" if row.reason else row.state,
            )  # fmt: skip
        return render(table)

    def _plans(self) -> list[Plan]:
        if self._subject.plan is not None:
            return [self._subject.plan]
        return list(dict.fromkeys(graph.plan for graph in self._subject.graphs))

    def _complaint(self) -> str:
        """Return what the user should hear at the end, or an empty string."""
        rows = self.report()
        if not any(row.tokens for row in rows):
            return (
                "nbl.monitor saw no token: no compiled graph of this model ran inside the block "
                "(call the compiled model there; was its plan attached after it was compiled?)"
            )
        return _sentence(rows, self._limits) if _fits(rows) is False else ""


def _fits(rows: tuple[SiteTraffic, ...]) -> bool | None:
    judged = [row.state for row in rows if row.state not in ("undecided", "unknown")]
    return all(state == "fits" for state in judged) if judged else None


def _sentence(rows: tuple[SiteTraffic, ...], limits: MonitorLimits) -> str:
    bad = [row for row in rows if row.state in ("drifted", "overflows")]
    if bad:
        named = "; ".join(f"{row.site}: {row.reason}" for row in bad[:_NAMED])
        more = "; …" if len(bad) > _NAMED else ""
        return (
            f"the plan no longer fits the traffic at {len(bad)} of {len(rows)} sites ({named}"
            f"{more}); calibrate on such text: nbl.calibrate(model, batches)"
        )
    if not any(row.tokens >= limits.tokens for row in rows):
        seen = max((row.tokens for row in rows), default=0)
        return f"undecided: {seen} tokens seen, {limits.tokens} are needed"
    unknown = sum(row.state == "unknown" for row in rows)
    if unknown:
        return (
            f"drift is not known at {unknown} of {len(rows)} sites: the plan was written before "
            "plans held the distribution of their inputs; calibrate again"
        )
    undecided = sum(row.state == "undecided" for row in rows)
    rest = f" ({undecided} of {len(rows)} sites saw too few tokens)" if undecided else ""
    return f"the plan fits the traffic{rest}"


def _seen(plan: Plan, site: Site, start: _Counts, end: _Counts) -> Seen:
    """Add up one site's counts in all graphs, between two moments."""
    parts = [
        sums.since(start.inputs.get(key))
        for key, sums in end.inputs.items()
        if key[0].plan is plan and key[1] == site.name
    ]
    tokens = sum(int(part.tokens) for part in parts)
    guard = _guard(plan, site, start, end)
    if not site.inputs or not tokens:
        return Seen(tokens, guard=guard)
    mean = torch.stack([part.first for part in parts]).sum(0) / tokens
    square = torch.stack([part.second for part in parts]).sum(0) / tokens
    return Seen(tokens, float(mean.square().mean().sqrt()), float(square.mean()), guard)


def _guard(plan: Plan, site: Site, start: _Counts, end: _Counts) -> GuardCounts | None:
    own = [key for key in end.guards if key[0].plan is plan and key[1] == site.name]
    if not own:
        return None
    parts = [
        (end.guards[key] - start.guards[key] if key in start.guards else end.guards[key]).cpu()
        for key in own
    ]
    tokens, outliers, _, dense = torch.stack(parts).sum(0).tolist()
    # The largest number for one token cannot be told from differences.
    return GuardCounts(tokens, outliers, 0, dense)
