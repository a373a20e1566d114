"""Speed rows for people and for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from nbl_compiler.speed import SpeedRow


def speed_table(rows: Sequence[SpeedRow]) -> Table:
    """Return one line a point: medians, spread, speed-up measured and predicted, KV bytes."""
    table = Table(title="dense Inductor against nbl, interleaved medians", title_justify="left")
    for name in (
        "",
        "context",
        "dense ms",
        "nbl ms",
        "spread",
        "speed-up",
        "predicted",
        "KV bytes",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        kv = f"{row.kv_bytes[0]:,} → {row.kv_bytes[1]:,}" if row.what == "decode" else "-"
        spread = f"{max(row.dense.spread, row.nbl.spread):.0%}"
        table.add_row(
            row.what, f"{row.context:,}", f"{row.dense.median * 1e3:.1f}",
            f"{row.nbl.median * 1e3:.1f}", spread, f"{row.speedup:.2f}×",
            f"{row.predicted:.2f}×", kv,
        )  # fmt: skip
    return table


def as_rows(rows: Sequence[SpeedRow]) -> list[dict[str, Any]]:
    """Return plain values."""
    return [
        {
            "what": row.what,
            "context": row.context,
            "dense_seconds": row.dense.runs,
            "nbl_seconds": row.nbl.runs,
            "speedup": row.speedup,
            "predicted": row.predicted,
            "kv_bytes": row.kv_bytes,
        }
        for row in rows
    ]
