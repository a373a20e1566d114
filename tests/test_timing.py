"""Timing helpers (never how long anything takes)."""

from __future__ import annotations

from nbl_compiler.timing import Timing, interleaved


def test_contenders_take_turns():
    calls: list[str] = []
    result = interleaved({n: lambda n=n: calls.append(n) for n in ("a", "b")}, repeats=3)
    assert calls == ["a", "b"] * 3
    assert all(len(timing.runs) == 3 for timing in result.values())


def test_median_and_spread():
    timing = Timing((1.0, 4.0, 2.0))
    assert timing.median == 2.0
    assert timing.spread == 1.5
