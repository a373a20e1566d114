"""A site's graph as SVG: boxes in layers, edges downwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from nbl_compiler.site_rows import NodeView

_WIDTH, _HEIGHT = 170, 36  # of a box, pixels
_GAP_X, _GAP_Y, _MARGIN = 14, 26, 8
_LONGEST = 26  # characters that fit into a box


def draw(nodes: Sequence[NodeView]) -> str:
    """Return an SVG drawing of the nodes, and of what enters them.

    Args:
        nodes: In graph order.
    """
    layers = _layers(nodes)
    widest = max(map(len, layers), default=1)
    width = widest * (_WIDTH + _GAP_X) - _GAP_X + 2 * _MARGIN
    height = len(layers) * (_HEIGHT + _GAP_Y) - _GAP_Y + 2 * _MARGIN
    places: dict[str, tuple[float, float]] = {}
    for depth, layer in enumerate(layers):
        span = len(layer) * (_WIDTH + _GAP_X) - _GAP_X
        for column, name in enumerate(layer):
            x = (width - span) / 2 + column * (_WIDTH + _GAP_X)
            places[name] = (x, _MARGIN + depth * (_HEIGHT + _GAP_Y))
    inside = {node.name: node for node in nodes}
    edges = [
        _edge(places[source], places[node.name])
        for node in nodes
        for source in dict.fromkeys(node.inputs)
    ]
    boxes = [_box(place, name, inside.get(name)) for name, place in places.items()]
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}" '
        f'role="img">{"".join(edges)}{"".join(boxes)}</svg>'
    )


def _layers(nodes: Sequence[NodeView]) -> list[list[str]]:
    """Return names by their longest path from what enters, each layer ordered by its sources."""
    depth: dict[str, int] = {}
    for node in nodes:
        for source in node.inputs:
            depth.setdefault(source, 0)
        depth[node.name] = 1 + max((depth[source] for source in node.inputs), default=-1)
    inside = {node.name for node in nodes}
    # What enters is drawn right above its first reader, not all in the first row.
    readers = {
        name: min(depth[node.name] for node in nodes if name in node.inputs)
        for name in depth
        if name not in inside
    }
    depth |= {name: reader - 1 for name, reader in readers.items()}
    layers: list[list[str]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    for name, level in depth.items():
        layers[level].append(name)
    column: dict[str, float] = {}
    sources = {node.name: node.inputs for node in nodes}
    for layer in layers:
        centres = {name: _centre(sources.get(name, ()), column) for name in layer}
        layer.sort(key=centres.__getitem__)
        column |= {name: place - len(layer) / 2 for place, name in enumerate(layer)}
    return layers


def _centre(sources: Sequence[str], column: Mapping[str, float]) -> float:
    known = [column[source] for source in sources if source in column]
    return sum(known) / len(known) if known else 0.0


def _edge(start: tuple[float, float], end: tuple[float, float]) -> str:
    x1, y1 = start[0] + _WIDTH / 2, start[1] + _HEIGHT
    x2, y2 = end[0] + _WIDTH / 2, end[1]
    bend = (y2 - y1) / 2
    return (
        f'<path class="edge" d="M{x1:.0f} {y1:.0f}C{x1:.0f} {y1 + bend:.0f} {x2:.0f} '
        f'{y2 - bend:.0f} {x2:.0f} {y2:.0f}"/>'
    )


def _box(place: tuple[float, float], name: str, node: NodeView | None) -> str:
    x, y = place
    kind, first, second = ("input", name, "") if node is None else ("node", "", "")
    if node is not None:
        first, second = node.operation, node.shape
    middle = x + _WIDTH / 2
    lines = [f'<text x="{middle:.0f}" y="{y + (15 if second else 22):.0f}">{_short(first)}</text>']
    if second:
        lines.append(
            f'<text class="shape" x="{middle:.0f}" y="{y + 29:.0f}">{_short(second)}</text>'
        )
    return (
        f'<g class="{kind}"><title>{escape(str(node) if node else name)}</title>'
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{_WIDTH}" height="{_HEIGHT}" rx="6"/>'
        f"{''.join(lines)}</g>"
    )


def _short(text: str) -> str:
    """Return the end of a long name: that is where names differ."""
    return escape(text if len(text) <= _LONGEST else "…" + text[1 - _LONGEST :])
