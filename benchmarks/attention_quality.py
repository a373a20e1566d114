"""Perplexity after linearizing m attention layers: NBL here, as published, and dropping layers.

    python benchmarks/attention_quality.py --text calibration.jsonl --eval-text held_out.txt

One calibration serves every m. Perplexity is taken at 512 tokens, float32, on text that
calibration never saw. ``--paper`` adds the published recipe (arXiv 2505.21077: the residual stream
as input, the order of the CCA bound, no ridge), which takes a calibration of its own.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from decoder_texts import arguments, load
from rich.console import Console
from rich.table import Table

from nbl_compiler.calibration import observe_model
from nbl_compiler.config import Attention, Config
from nbl_compiler.evaluation.dropping import dropping
from nbl_compiler.plans import Plan


def main() -> None:
    """Print one table: m, perplexity, ratio to dense, and the same for dropping."""
    parser = arguments(__doc__, tokens=81_920, eval_tokens=8_192)
    parser.add_argument("--counts", default="2,4,8")
    parser.add_argument("--input", default="normed", choices=("normed", "residual"))
    parser.add_argument("--rank-by", default="loss", choices=("loss", "nmse", "cca"))
    parser.add_argument("--taps", type=int, default=0)
    parser.add_argument("--mixed", action="store_true", help="maps read mixed values")
    parser.add_argument("--paper", action="store_true", help="also the published recipe")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    subject = load(args)
    model, batches = subject.model, subject.batches()
    counts = [int(item) for item in args.counts.split(",")]
    attention = Attention(
        count=max(counts),
        input=args.input,
        rank_by=args.rank_by,
        taps=args.taps,
        mixed=args.mixed,
    )
    calibrated = observe_model(model, batches, Config(attention=attention))
    published = None
    if args.paper:
        recipe = Attention(count=max(counts), input="residual", rank_by="cca")
        published = observe_model(model, batches, Config(attention=recipe, ridge=0.0))
    dense = subject.perplexity(Plan())
    rows: list[dict[str, Any]] = []
    for count in counts:
        plan = calibrated.plan(replace(attention, count=count))
        row: dict[str, Any] = {
            "m": count,
            "nbl": subject.perplexity(plan),
            "dropped": subject.perplexity(dropping(plan)),
            "dense": dense,
            "layers": [site.name for site in plan.rewritten],
        }
        if published is not None:
            row["published"] = subject.perplexity(published.plan(replace(recipe, count=count)))
        rows.append(row)
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    table = Table(title=f"{args.model}: perplexity, dense {dense:.2f}", title_justify="left")
    for name in ("m", "nbl", "nbl / dense", "dropped", "dropped / dense", "published", "layers"):
        table.add_column(name, justify="right")
    every = [site.name for site in calibrated.plan().sites]
    for row in rows:
        table.add_row(
            str(row["m"]), f"{row['nbl']:.1f}", f"{row['nbl'] / dense:.3f}×",
            f"{row['dropped']:.1f}", f"{row['dropped'] / dense:.2f}×",
            f"{row['published'] / dense:.2f}×" if published is not None else "-",
            ", ".join(str(every.index(name)) for name in row["layers"]),
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
