"""Perplexity of plans before and after a teacher refit, on text that neither ever saw.

    python benchmarks/refit_quality.py --text calibration.jsonl --eval-text held_out.txt

Each case is calibrated on the text and fitted anew on the same text (``nbl.refit``).
"""

from __future__ import annotations

import json
import time
from typing import Any

from decoder_texts import arguments, load
from rich.console import Console
from rich.table import Table

import nbl_compiler as nbl
from nbl_compiler.plans import Plan


def cases(layers: int) -> dict[str, nbl.Config]:
    """Return the plans to refit: name → configuration."""
    half, quarter = (
        nbl.Attention(count=layers // 2, taps=1),
        nbl.Attention(count=layers // 4, taps=1),
    )
    return {
        "keep-0.25": nbl.Config(None, nbl.FFN(count=layers, keep=0.25)),
        "keep-0.5": nbl.Config(None, nbl.FFN(count=layers, keep=0.5)),
        "attention-quarter": nbl.Config(quarter),
        "attention-half": nbl.Config(half),
        "both": nbl.Config(quarter, nbl.FFN(count=layers, keep=0.5)),
    }


def main() -> None:
    """Print one table: loss on trial text and perplexity on other text, before and after."""
    parser = arguments(__doc__, tokens=24_576, eval_tokens=8_192)
    parser.add_argument("--cases", default="keep-0.25,keep-0.5,attention-quarter,attention-half")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    subject = load(args)
    model, batches = subject.model, subject.batches()
    known = cases(model.config.get_text_config().num_hidden_layers)
    dense = subject.perplexity(Plan())
    rows: list[dict[str, Any]] = []
    for name in args.cases.split(","):
        plan = nbl.calibrate(model, batches, known[name])
        started = time.perf_counter()
        refitted = nbl.refit(model, plan, batches)
        row = {"case": name, "seconds": time.perf_counter() - started, "dense": dense}
        row |= {"before": subject.perplexity(plan), "after": subject.perplexity(refitted)}
        row |= dict(refitted.config["refit"])
        row["strengths"] = [site.details.get("refit_strength") for site in refitted.rewritten]
        rows.append(row)
        print(json.dumps(row), flush=True)
    if args.json:
        return
    table = Table(title=f"{args.model}: perplexity, dense {dense:.2f}", title_justify="left")
    for title in ("case", "before", "after", "KL before", "KL after", "seconds", "fitted anew"):
        table.add_column(title, justify="right")
    for row in rows:
        anew = sum(strength is not None for strength in row["strengths"])
        table.add_row(
            row["case"], f"{row['before'] / dense:.3f}×", f"{row['after'] / dense:.3f}×",
            f"{row['loss_before']:.4f}", f"{row['loss_after']:.4f}", f"{row['seconds']:.0f}",
            f"{anew} of {len(row['strengths'])}",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
