"""``nbl bench compare``: two result files of the benchmark, ratio by ratio.

Absolute times belong to a machine and an hour; what is compared are figures relative to the dense
model of the same run: the speed-up over dense Inductor, perplexity over dense, bytes over dense.
Every ratio comes with the least and the greatest of its rounds, and only what lies beyond both
files' spread counts as a change.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from nbl_compiler.errors import ConfigError

FORMAT = 1
"""Version of the result files that can be read (``benchmarks/run.py`` writes them)."""
TOLERANCE = 0.02
"""Relative changes up to this are none: kernels that round in another order move perplexity by a
few thousandths, and layouts move a time by a percent."""

Verdict = Literal["better", "worse", "same", "gone"]


@dataclass(frozen=True)
class Ratio:
    """A figure relative to the dense model of the same run.

    Args:
        value: Of the medians.
        low: The least of the rounds.
        high: The greatest of the rounds.
        better: Which direction is an improvement.
    """

    value: float
    low: float
    high: float
    better: Literal["higher", "lower"]

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.value:.3f}"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Change:
    """One ratio in both files.

    Args:
        row: Name of the measured point and contender.
        figure: Which ratio.
        before: In the first file.
        after: In the second; None if the contender could not take part there.
        verdict: ``"gone"`` where it could not.
        reason: Why it could not.
    """

    row: str
    figure: str
    before: Ratio
    after: Ratio | None
    verdict: Verdict
    reason: str = ""


@dataclass(frozen=True)
class Comparison:
    """What changed between two files.

    Args:
        changes: Every ratio that the first file has and the second should have.
        notes: What differs around the figures: machine, versions, points that only one file has.
    """

    changes: tuple[Change, ...]
    notes: tuple[str, ...]

    @property
    def regressions(self) -> tuple[Change, ...]:
        """What got worse beyond the spread, or cannot be measured any more."""
        return tuple(c for c in self.changes if c.verdict in ("worse", "gone"))

    def table(self, everything: bool = False) -> Table:
        """Return a table of what changed.

        Args:
            everything: Also of what did not.
        """
        table = Table("point", "figure", "before", "after", "change", "", title_justify="left",
                      title="relative to the dense model of the same run")  # fmt: skip
        for change in self.changes:
            if change.verdict != "same" or everything:
                table.add_row(
                    change.row, change.figure, str(change.before),
                    change.reason if change.after is None else str(change.after),
                    "" if change.after is None else f"{_relative(change):+.1%}", change.verdict,
                )  # fmt: skip
        return table

    def summary(self) -> str:
        """Return one sentence."""
        count = {v: sum(c.verdict == v for c in self.changes) for v in ("better", "worse", "gone")}
        return (
            f"{len(self.changes)} ratios compared: {count['better']} better, {count['worse']} "
            f"worse, {count['gone']} no longer measured, the others within the spread"
        )

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"changes": [asdict(change) for change in self.changes], "notes": list(self.notes)}


def compare(before: Path, after: Path, tolerance: float = TOLERANCE) -> Comparison:
    """Compare two result files.

    Args:
        before: Written by ``benchmarks/run.py``.
        after: Another one.
        tolerance: Relative changes up to this are none, whatever the spread.

    Raises:
        FileNotFoundError: if a file does not exist.
        ConfigError: if a file is none of the benchmark's, or the two have no point in common, or
            measured quality on other text.
    """
    first, second = _read(before), _read(after)
    common = [name for name in first["rows"] if name in second["rows"]]
    if not common:
        raise ConfigError(f"{before} and {after} have no point in common: nothing to compare")
    _check_text(first, second, common, (before, after))
    changes: list[Change] = []
    for name in common:
        old, new = first["rows"][name], second["rows"][name]
        for figure, ratio in old.get("ratios", {}).items():
            was = Ratio(**ratio)
            if "skipped" in new:
                changes.append(Change(name, figure, was, None, "gone", str(new["skipped"])))
            elif figure in new.get("ratios", {}):
                now = Ratio(**new["ratios"][figure])
                changes.append(Change(name, figure, was, now, verdict(was, now, tolerance)))
    if not changes:
        raise ConfigError(f"{before} and {after} have no ratio in common: nothing to compare")
    return Comparison(tuple(changes), tuple(_notes(first, second, len(common))))


def verdict(before: Ratio, after: Ratio, tolerance: float = TOLERANCE) -> Verdict:
    """Tell whether a ratio changed by more than the tolerance, and beyond both spreads."""
    overlap = before.low <= after.high and after.low <= before.high
    if overlap or abs(after.value - before.value) <= tolerance * abs(before.value):
        return "same"
    return "better" if (after.value > before.value) == (before.better == "higher") else "worse"


def _relative(change: Change) -> float:
    assert change.after is not None
    return change.after.value / change.before.value - 1 if change.before.value else 0.0


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no JSON file: {error}") from None
    if not isinstance(content, dict) or not {"format", "settings", "rows"} <= content.keys():
        raise ConfigError(f"{path} holds no results of the benchmark (benchmarks/run.py --out)")
    if content["format"] != FORMAT:
        raise ConfigError(
            f"{path} has format {content['format']!r}, this release reads {FORMAT}; measure again"
        )
    return content


def _check_text(
    first: Mapping[str, Any],
    second: Mapping[str, Any],
    common: list[str],
    paths: tuple[Path, Path],
) -> None:
    """Refuse to compare quality on other text; speed does not depend on it."""
    if not any(first["rows"][name].get("kind") == "quality" for name in common):
        return
    for key in ("text", "eval_text", "tokens", "eval_tokens", "seed"):
        values = [content["settings"].get(key) for content in (first, second)]
        if values[0] != values[1]:
            raise ConfigError(
                f"{paths[0]} measured quality with {key}={values[0]!r}, {paths[1]} with "
                f"{values[1]!r}: measure both on the same text"
            )


def _notes(first: Mapping[str, Any], second: Mapping[str, Any], common: int) -> list[str]:
    notes = []
    for group in ("machine", "versions"):
        old, new = (content["settings"].get(group, {}) for content in (first, second))
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                notes.append(f"{group}: {key} {old.get(key)} → {new.get(key)}")
    for what, content in (("first", first), ("second", second)):
        alone = len(content["rows"]) - common
        if alone:
            notes.append(f"{alone} rows are in the {what} file alone")
    return notes
