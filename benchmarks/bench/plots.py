"""Result rows as pictures: loss against speed, speed-up against context, the roofline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.results import Row
from bench.speed_points import DENSE
from bench.tables import distinct, of_kind, value

_STYLE = {"svg.hashsalt": "bench", "svg.fonttype": "none"}  # the same rows, the same file
WORST = 30.0
"""Perplexity over dense beyond which a contender is off the picture."""


def draw(rows: Sequence[Row], folder: Path) -> dict[str, str]:
    """Draw what the rows allow.

    Args:
        rows: All of a result file.
        folder: Where the SVG files go.

    Returns:
        File name → what it shows.
    """
    import matplotlib as mpl

    mpl.use("svg")
    made = {}
    drawings: tuple[tuple[str, Callable[[Sequence[Row]], Any], str], ...] = (
        ("loss_bytes.svg", loss_against_bytes, "perplexity over dense, weight bytes a token"),
        ("loss_speed.svg", loss_against_speed, "perplexity over dense, speed-up of decode"),
        ("context.svg", speed_against_context, "speed-up of decode, tokens of context"),
        ("roofline.svg", roofline, "arithmetic done, arithmetic for each byte"),
    )
    with mpl.rc_context(_STYLE):
        for name, drawing, what in drawings:
            figure = drawing(rows)
            if figure is not None:
                folder.mkdir(parents=True, exist_ok=True)
                figure.savefig(folder / name, metadata={"Date": None})
                made[name] = what
    return made


def loss_against_bytes(rows: Sequence[Row]) -> Any:
    """Return a figure of decoders' quality over the weights a token reads, or None."""
    pairs = [(row, value(row, "weight bytes")) for row in _judged(rows)]
    return _loss(pairs, "weight bytes that a decoded token reads / dense")


def loss_against_speed(rows: Sequence[Row]) -> Any:
    """Return a figure of quality over speed, of models that have both, or None."""
    fast: dict[tuple[Any, ...], list[float]] = {}
    for row in of_kind(rows, "speed"):
        if row["phase"] == "decode":
            key = row["model"], row["contender"], row["fraction"]
            fast.setdefault(key, []).append(value(row, "speed-up"))
    pairs = [
        (row, max(fast[key]))
        for row in _judged(rows)
        if (key := (row["model"], row["contender"], row["fraction"])) in fast
    ]
    return _loss(pairs, "speed-up of decode over dense Inductor, best context")


def speed_against_context(rows: Sequence[Row]) -> Any:
    """Return a figure of decode at batch 1, a panel a model and dtype, or None."""
    import matplotlib.pyplot as plt

    chosen = [r for r in of_kind(rows, "speed") if (r["phase"], r["batch"]) == ("decode", 1)]
    chosen = [row for row in chosen if row["at"] == 0.5 and row["contender"] != DENSE]
    panels = [
        panel
        for panel in distinct(chosen, "model", "dtype")
        if len({r["context"] for r in chosen if (r["model"], r["dtype"]) == panel}) > 1
    ]
    if not panels:
        return None
    width = 4.5 * len(panels)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(width, 3.6), layout="constrained", squeeze=False, sharey=True
    )
    for axis, (model, dtype) in zip(axes[0], panels, strict=True):
        own = [row for row in chosen if (row["model"], row["dtype"]) == (model, dtype)]
        for (name,) in distinct(own, "contender"):
            line = sorted((r for r in own if r["contender"] == name), key=lambda r: r["context"])
            x = [row["context"] for row in line]
            (drawn,) = axis.plot(x, [value(row, "speed-up") for row in line], "o-", label=name)
            predicted = [row["predicted_speedup"] for row in line]
            axis.plot(x, predicted, ":", color=drawn.get_color())
        axis.set(title=f"{model}, {dtype}", xlabel="tokens of context (dotted: predicted)")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda number, _: f"{number:,.0f}")
        axis.axhline(1, color="grey", linewidth=0.8)
    axes[0][0].set_ylabel("speed-up over dense Inductor")
    axes[0][-1].legend(fontsize="small")
    return figure


def roofline(rows: Sequence[Row]) -> Any:
    """Return a figure of every point under the measured roof, or None."""
    import matplotlib.pyplot as plt

    chosen = [row for row in of_kind(rows, "speed") if row["dtype"] == "float32"]
    if not chosen:
        return None
    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for (name,) in distinct(chosen, "contender"):
        own = [row for row in chosen if row["contender"] == name]
        intensity = [row["flops_per_token"] / row["bytes_per_token"] for row in own]
        done = [row["flops_per_token"] * row["tokens_per_second"] for row in own]
        axis.loglog(intensity, done, "o", label=name, alpha=0.7)
    low, high = axis.get_xlim()
    rates = chosen[0]["rates"]
    marks = [low * (high / low) ** (i / 60) for i in range(61)]
    for rate, style, what in (
        ("bytes_per_second", "-", "matrix-vector products"),
        ("streamed_bytes_per_second", "--", "streamed products"),
    ):
        roof = [min(x * rates[rate], rates["flops_per_second"]) for x in marks]
        axis.loglog(marks, roof, style, color="grey", label=f"roof, {what}")
    axis.set(xlabel="FLOP for each byte", ylabel="FLOP/s")
    axis.legend(fontsize="small")
    return figure


def _judged(rows: Sequence[Row]) -> list[Row]:
    return [row for row in of_kind(rows, "quality") if "perplexity" in row]


def _loss(pairs: Sequence[tuple[Row, float]], xlabel: str) -> Any:
    import matplotlib.pyplot as plt

    shown = [(row, x) for row, x in pairs if value(row, "perplexity") <= WORST]
    if not shown:
        return None
    models = distinct([row for row, _ in shown], "model")
    figure, axes = plt.subplots(
        1, len(models), figsize=(6 * len(models), 4), layout="constrained", squeeze=False
    )
    for axis, (model,) in zip(axes[0], models, strict=True):
        own = [(row, x) for row, x in shown if row["model"] == model]
        for (name,) in distinct([row for row, _ in own], "contender"):
            line = sorted(
                ((x, value(row, "perplexity")) for row, x in own if row["contender"] == name)
            )
            axis.plot(*zip(*line, strict=True), "o-", label=name)
        axis.set(title=model, xlabel=xlabel)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(lambda number, _: f"{number:g}")
        axis.yaxis.set_minor_formatter(lambda number, _: f"{number:g}")
        axis.axhline(1, color="grey", linewidth=0.8)
    axes[0][0].set_ylabel("perplexity / dense")
    axes[0][-1].legend(fontsize="small")
    return figure
