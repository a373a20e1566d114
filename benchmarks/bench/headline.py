"""The README's table: what is gained and what is lost, next to the nearest peers."""

from __future__ import annotations

from collections.abc import Iterable

from bench.results import Row
from bench.tables import column, distinct, markdown, of_kind, value

FASTER = (
    "empty plan", "attention dropped", "NBL", "value taps", "mixed values", "magnitude",
    "keep+fold", "guarded",
)  # fmt: skip
LOSSES = (
    "attention dropped", "NBL, published", "NBL", "value taps", "mixed values", "magnitude",
    "FLAP", "Wanda", "RIA", "TEAL", "CATS", "keep+fold", "guarded",
)  # fmt: skip
_OPENING = (
    "Next to other ways to the same end, all of a row in turns in one process, by "
    "[the benchmark](docs/bench.md) (`make bench`, and `make bench BENCH=sweep` for further "
    "contexts; an empty plan rewrites nothing, but streams the products of few tokens):"
)
DTYPE, BATCH, FRACTION = "float32", 1, 0.5


def headline(rows: Iterable[Row]) -> str:
    """Return two tables: speed-up over dense Inductor at points of batch 1, and perplexity."""
    rows = list(rows)
    parts = [part for part in (_speed(rows), _quality(rows)) if part]
    return "\n\n".join([_OPENING, *parts]) if parts else ""


def _speed(rows: list[Row]) -> str:
    chosen = [
        row
        for row in of_kind(rows, "speed")
        if (row["dtype"], row["batch"], row["at"]) == (DTYPE, BATCH, FRACTION)
        and row["contender"] in FASTER
    ]
    if not chosen:
        return ""
    who = [name for name in FASTER if any(row["contender"] == name for row in chosen)]
    lines = []
    for model, phase, context in distinct(chosen, "model", "phase", "context"):
        here = {
            row["contender"]: row
            for row in chosen
            if (row["model"], row["phase"], row["context"]) == (model, phase, context)
        }
        cells = (f"{value(here[n], 'speed-up'):.2f}×" if n in here else "–" for n in who)
        lines.append((f"{model}, {phase}, {context:,} tokens", *cells))
    head = ("", *(column(chosen, name) for name in who))
    title = (
        f'Speed-up over dense `backend="inductor"`, half of the attention layers or of every '
        f"FFN's neurons replaced, {DTYPE}, batch {BATCH}:"
    )
    return f"{title}\n\n{markdown(head, lines)}"


def _quality(rows: list[Row]) -> str:
    measured = [
        row
        for row in of_kind(rows, "quality")
        if "perplexity" in row and row["contender"] in LOSSES
    ]
    parts = []
    for (model,) in distinct(measured, "model"):
        own = [row for row in measured if row["model"] == model]
        for family, what in (("attention", "attention layers"), ("ffn", "every FFN's neurons")):
            of_family = [row for row in own if row["family"] == family]
            shares = sorted(fraction for (fraction,) in distinct(of_family, "fraction"))
            lines = []
            for name in (n for n in LOSSES if any(r["contender"] == n for r in of_family)):
                found = {r["fraction"]: r for r in of_family if r["contender"] == name}
                cells = (
                    f"{value(found[s], 'perplexity'):.2f}" if s in found else "–" for s in shares
                )
                lines.append((name, *cells))
            if lines:
                head = (f"{model}, share of {what} replaced", *(f"{s:.0%}" for s in shares))
                parts.append(markdown(head, lines))
    if not parts:
        return ""
    return "Perplexity over that of the dense model:\n\n" + "\n\n".join(parts)
