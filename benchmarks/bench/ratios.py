"""Figures that mean something on another machine: relative to the dense model of the same run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Literal

Ratio = dict[str, float | str]


def exact(value: float, better: Literal["higher", "lower"]) -> Ratio:
    """Return a ratio that does not scatter."""
    return {"value": value, "low": value, "high": value, "better": better}


def of_rounds(dense: Sequence[float], own: Sequence[float]) -> Ratio:
    """Return the speed-up of interleaved runs: median, least and greatest of the rounds.

    Args:
        dense: Seconds of the dense model, one a round.
        own: Seconds of the contender in the same rounds.
    """
    rounds = [a / b for a, b in zip(dense, own, strict=True)]
    return {
        "value": statistics.median(dense) / statistics.median(own),
        "low": min(rounds),
        "high": max(rounds),
        "better": "higher",
    }
