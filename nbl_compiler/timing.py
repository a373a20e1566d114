"""Timing that survives a noisy machine: interleaved runs, medians, spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender over several runs."""

    runs: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.runs)

    @property
    def spread(self) -> float:
        """(slowest − fastest) / median."""
        return (max(self.runs) - min(self.runs)) / self.median


def seconds_of(function: Callable[[], object]) -> float:
    """Return the seconds of one call, device work included."""
    _synchronize()
    started = time.perf_counter()
    function()
    _synchronize()
    return time.perf_counter() - started


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median_seconds(function: Callable[[], object], repeats: int = 5) -> float:
    """Return the median of several calls, after one to warm up."""
    function()
    return statistics.median(seconds_of(function) for _ in range(repeats))


def interleaved(
    contenders: Mapping[str, Callable[[], object]], repeats: int = 5
) -> dict[str, Timing]:
    """Time the contenders in turn, A B A B …, so that a drift of the machine hits both.

    Every contender must have run once before (compiled, warm).
    """
    runs: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, function in contenders.items():
            runs[name].append(seconds_of(function))
    return {name: Timing(tuple(values)) for name, values in runs.items()}
