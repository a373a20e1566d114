"""Quality against speed: what each further site would add, as an SVG line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 560, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 32, 12, 40


@dataclass(frozen=True)
class Point:
    """The sites up to this one, best first.

    Args:
        site: Name of the last one.
        speedup: Predicted, of the whole graph.
        error: Sum of the sites' held-out NMSE.
    """

    site: str
    speedup: float
    error: float


def points(saved: Sequence[tuple[str, float, float]], total_seconds: float) -> list[Point]:
    """Return the curve from the dense graph on.

    Args:
        saved: (site, held-out NMSE, seconds saved) of every rewritten site.
        total_seconds: Of the dense graph.
    """
    made = [Point("dense", 1.0, 0.0)]
    left, error = total_seconds, 0.0
    for site, nmse, seconds in sorted(saved, key=lambda item: item[1]):
        left -= seconds
        error += nmse
        if left > 0:
            made.append(Point(site, total_seconds / left, error))
    return made


def draw_curve(curve: Sequence[Point]) -> str:
    """Return the curve as SVG: held-out error (upwards) against predicted speed-up."""
    fastest = max(point.speedup for point in curve)
    slowest = min(point.speedup for point in curve)
    worst = max(point.error for point in curve)
    if not worst or math.isclose(fastest, slowest):
        return ""
    inner_x, inner_y = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def place(point: Point) -> tuple[float, float]:
        across = (point.speedup - slowest) / (fastest - slowest)
        return _LEFT + across * inner_x, _TOP + (1 - point.error / worst) * inner_y

    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, curve))
    dots = "".join(
        f'<circle cx="{place(p)[0]:.1f}" cy="{place(p)[1]:.1f}" r="3.5"><title>{escape(p.site)}: '
        f"{p.speedup:.3f}×, {p.error:.3f}</title></circle>"
        for p in curve
    )
    floor = _TOP + inner_y
    ticks = "".join(
        f'<text x="{_LEFT + share * inner_x:.0f}" y="{floor + 16}">'
        f"{slowest + share * (fastest - slowest):.3f}×</text>"
        f'<text class="left" x="{_LEFT - 6}" y="{floor - share * inner_y + 4:.0f}">'
        f"{share * worst:.2f}</text>"
        for share in (0, 0.5, 1)
    )
    return (
        f'<svg class="curve" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img">'
        f'<path class="axis" d="M{_LEFT} {_TOP}V{floor}H{_WIDTH - _RIGHT}"/>'
        f'<polyline points="{line}"/>{dots}{ticks}'
        f'<text x="{_LEFT + inner_x / 2:.0f}" y="{_HEIGHT - 6}">predicted speed-up</text></svg>'
    )
