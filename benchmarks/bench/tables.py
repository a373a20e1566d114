"""Result rows as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.results import Row

Rows = Sequence[Row]


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]], left: int = 1) -> str:
    """Return a table whose first ``left`` columns are text and the others numbers."""
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines))


def of_kind(rows: Iterable[Row], kind: str) -> list[Row]:
    """Return the rows of a kind that were measured."""
    return [row for row in rows if row["kind"] == kind and "skipped" not in row]


def distinct(rows: Iterable[Row], *keys: str) -> list[tuple[Any, ...]]:
    """Return the values that the keys take together, in order of appearance."""
    return list(dict.fromkeys(tuple(row[key] for key in keys) for row in rows))


def quality(rows: Iterable[Row]) -> str:
    """Return one table a decoder: what each contender loses."""
    parts = []
    measured = [row for row in of_kind(rows, "quality") if "perplexity" in row]
    for (model,) in distinct(measured, "model"):
        own = [row for row in measured if row["model"] == model]
        dense = own[0]
        lines = [
            (
                row["contender"], row["origin"], _fraction(row),
                f"{value(row, 'perplexity'):.3f} [{row['interval'][0]:.3f}, "
                f"{row['interval'][1]:.3f}]",
                f"{row['kl']:.3f}", f"{row['top1']:.1%}", f"{value(row, 'weight bytes'):.2f}",
                f"{row['calibration_seconds']:.0f} s",
            )
            for row in own
        ]  # fmt: skip
        head = (
            "contender", "whose", "replaced", "perplexity / dense [95 %]", "KL, nats",
            "same top token", "weight bytes a token / dense", "calibration",
        )  # fmt: skip
        title = (
            f"**{model}**, {dense['tokens']:,} predicted tokens in rows of 512, dense perplexity "
            f"{dense['dense_perplexity']:.2f}"
        )
        parts.append(f"{title}\n\n{markdown(head, lines, left=2)}")
    return "\n\n".join(parts) or _NOTHING


def embeddings(rows: Iterable[Row]) -> str:
    """Return one table an encoder: cosine with the dense embeddings."""
    parts = []
    measured = [row for row in of_kind(rows, "quality") if "cosine" in row]
    for (model,) in distinct(measured, "model"):
        own = [row for row in measured if row["model"] == model]
        lines = [
            (
                row["contender"], row["origin"], _fraction(row), f"{row['cosine']:.4f}",
                f"{row['least_cosine']:.3f}", f"{value(row, 'weight bytes'):.2f}",
            )
            for row in own
        ]  # fmt: skip
        head = ("contender", "whose", "replaced", "mean cosine", "least", "weight bytes / dense")
        title = f"**{model}**, {own[0]['texts']} sentences"
        parts.append(f"{title}\n\n{markdown(head, lines, left=2)}")
    return "\n\n".join(parts) or _NOTHING


def speed(rows: Iterable[Row]) -> str:
    """Return one table a model and dtype: speed-ups over dense Inductor, a column a contender."""
    parts = []
    measured = of_kind(rows, "speed")
    for model, dtype in distinct(measured, "model", "dtype"):
        own = [row for row in measured if (row["model"], row["dtype"]) == (model, dtype)]
        who = [name for (name,) in distinct(own, "contender")]
        lines = []
        for point in distinct(own, "phase", "context", "batch", "at"):
            here = {
                row["contender"]: row
                for row in own
                if (row["phase"], row["context"], row["batch"], row["at"]) == point
            }
            phase, context, batch, fraction = point
            cells = [_speedup(here.get(name)) for name in who]
            lines.append((phase, f"{context:,}", str(batch), f"{fraction:.0%}", *cells))
        head = ("phase", "context", "batch", "replaced", *(column(own, name) for name in who))
        parts.append(f"**{model}**, {dtype}\n\n{markdown(head, lines)}")
    return "\n\n".join(parts) or _NOTHING


def points(rows: Iterable[Row]) -> str:
    """Return every figure of every point."""
    parts = []
    measured = of_kind(rows, "speed")
    keys = ("model", "dtype", "phase", "context", "batch", "at")
    for point in distinct(measured, *keys):
        own = [row for row in measured if tuple(row[key] for key in keys) == point]
        lines = [
            (
                column([row], row["contender"]), f"{row['tokens_per_second']:,.1f}",
                f"{row['ms_per_token']:.3f}",
                f"{row['spread']:.0%}", _speedup(row), f"{row['predicted_seconds'] * 1e3:.1f}",
                f"{row['reached']:.0%}", f"{row['speedup_reached']:.0%}",
                _megabytes(row["bytes_per_token"]), _megabytes(row["resident_bytes"]),
                _megabytes(row["peak_bytes"]), _megabytes(row["kv_bytes"]),
                f"{row['compile_seconds']:.1f}", f"{row['calibration_seconds']:.1f}",
            )
            for row in own
        ]  # fmt: skip
        head = (
            "contender", "tokens/s", "ms a token", "spread", "speed-up (predicted)",
            "roofline, ms", "of the roofline", "of the predicted speed-up", "MB moved a token",
            "resident MB", "peak MB", "KV MB", "compile s", "calibration s",
        )  # fmt: skip
        model, dtype, phase, context, batch, fraction = point
        title = (
            f"### {model}, {dtype}, {phase}, {context:,} tokens, batch {batch}, "
            f"{fraction:.0%} replaced"
        )
        parts.append(f"{title}\n\n{markdown(head, lines)}")
    return "\n\n".join(parts) or _NOTHING


def skipped(rows: Iterable[Row]) -> str:
    """Return who could not take part, and why."""
    reasons: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        if "skipped" in row:
            about = row["contender"], row["skipped"]
            reasons.setdefault(about, set()).add(row["model"])
    lines = [(who, ", ".join(sorted(models)), why) for (who, why), models in reasons.items()]
    return markdown(("contender", "model", "why not"), lines, left=3) if lines else "Everyone did."


def growth(rows: Iterable[Row]) -> str:
    """Return how calibration and compilation grow."""
    measured = of_kind(rows, "growth")
    calibrated = [row for row in measured if row["what"] == "calibration"]
    lines = [
        (
            f"{row['width']:,}", str(row["layers"]), f"{row['tokens']:,}", *(
                f"{_median(row[f'{name}_seconds']):.1f}" for name in ("forward", "here",
                                                                      "published")
            ),
            f"{value(row, 'over published way'):.2f}×",
            f"{row['layers'] * _median(row['one_layer_seconds']):.1f}",
            f"{value(row, 'over a run a layer'):.1f}×", _megabytes(row["bytes"]["here"]),
            _megabytes(row["bytes"]["moments"]),
            _megabytes(row["bytes"]["published"]),
        )
        for row in calibrated
    ]  # fmt: skip
    head = (
        "hidden size", "layers", "tokens", "forward pass alone, s", "here, s", "published way, s",
        "faster by", "published way, the model run once a layer, s", "faster by",
        "peak here, MB", "of it moments, MB", "peak the published way, MB",
    )  # fmt: skip
    parts = [markdown(head, lines, left=0)] if lines else []
    compiled = [row for row in measured if row["what"] == "compilation"]
    if compiled:
        who = list(compiled[0]["compile_seconds"])
        lines = [
            (row["model"], str(row["layers"]), *(f"{row['compile_seconds'][n]:.1f}" for n in who))
            for row in compiled
        ]
        parts.append(markdown(("model", "layers", *(f"{n}, s" for n in who)), lines))
    return "\n\n".join(parts) or _NOTHING


def provenance(content: Mapping[str, Any]) -> str:
    """Return machine, versions, text and revision in a few lines."""
    settings = content["settings"]
    machine, versions = settings["machine"], settings["versions"]
    revisions = sorted({row["revision"][:12] for row in content["rows"].values()})
    return "\n".join(
        (
            f"- Machine: {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
            f"{machine['memory_bytes'] / 2**30:.0f} GiB, {machine['system']}",
            f"- Versions: {', '.join(f'{name} {version}' for name, version in versions.items())}",
            f"- Text: {settings['tokens']:,} tokens of {settings['text']} to calibrate on, "
            f"{settings['eval_tokens']:,} of {settings['eval_text']} to judge by; seed "
            f"{settings['seed']}",
            f"- Revision: {', '.join(revisions)}",
        )
    )


def value(row: Row, figure: str) -> float:
    """Return one of a row's ratios."""
    return float(row["ratios"][figure]["value"])


def column(rows: Iterable[Row], contender: str) -> str:
    """Return a contender's name, with what it replaces where that is more than others do."""
    more = {row["fraction"] for row in rows if row["contender"] == contender
            and row["fraction"] != row["at"]}  # fmt: skip
    return f"{contender} ({min(more):.0%})" if more else contender


_NOTHING = "Not measured in this run."


def _fraction(row: Row) -> str:
    return "–" if row["family"] in ("dense", "weights") else f"{row['fraction']:.0%}"


def _speedup(row: Row | None) -> str:
    if row is None:
        return "–"
    return f"{value(row, 'speed-up'):.2f}× ({row['predicted_speedup']:.2f}×)"


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f}"


def _median(runs: Sequence[float]) -> float:
    import statistics

    return statistics.median(runs)
