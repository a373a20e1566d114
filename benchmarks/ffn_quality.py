"""All FFNs of a decoder folded: error a layer, and perplexity against the share of neurons kept.

    python benchmarks/ffn_quality.py --text calibration.jsonl --eval-text held_out.txt \\
        --plot docs/ffn_perplexity.svg

First table: a static set of kept neurons and one map for the rest. Second table: no neuron kept, a
guard with a predictor (of 4 bits, unless told otherwise) puts a share of the neurons right on each
token; beside it the oracle, the same guard knowing every pre-activation. Third table: the same
guard with ``values="predicted"``, for which a share of the neurons costs a third of the bytes.
Held-out NMSE is taken on calibration text that the fit never saw, perplexity at 512 tokens on other
text.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench.results import Results
from decoder_texts import arguments, load
from rich.console import Console
from rich.table import Table

import nbl_compiler as nbl
from nbl_compiler.plans import Plan

EVERY = 1e9  # no error is too large: all FFNs are folded


def numbers(text: str) -> list[float]:
    return [float(item) for item in text.split(",") if item]


def errors(plan: Plan) -> dict[str, float]:
    """Return least, median and greatest held-out NMSE of a layer, and the share of bytes read."""
    nmse = torch.tensor([site.holdout_nmse for site in plan.sites])
    read = sum(site.details["parameters_read"] for site in plan.sites)
    share = read / sum(site.details["parameters"] for site in plan.sites)
    return {
        "least": float(nmse.min()),
        "median": float(nmse.median()),
        "greatest": float(nmse.max()),
        "bytes": share,
    }


def plot(tables: dict[str, list[dict[str, Any]]], dense: float, path: Path) -> None:
    """Draw perplexity against the share of neurons computed, and against the bytes read."""
    import matplotlib.pyplot as plt

    figure, (by_neurons, by_bytes) = plt.subplots(
        1, 2, figsize=(9, 3.5), layout="constrained", sharey=True
    )
    for name, rows in tables.items():
        if not rows:
            continue
        for axes, key in ((by_neurons, "share"), (by_bytes, "bytes")):
            rows = sorted(rows, key=lambda row: row[key])
            axes.plot([r[key] for r in rows], [r["perplexity"] for r in rows], "o-", label=name)
    by_neurons.set(xlabel="share of the neurons kept or put right", ylabel="perplexity")
    by_bytes.set(xlabel="share of the FFNs' bytes that a token reads")
    for axes in (by_neurons, by_bytes):
        axes.axhline(dense, color="grey", linestyle="--", label="dense")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:.0f}")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    by_neurons.legend()
    figure.savefig(path)


def main() -> None:
    """Calibrate every form, measure, print two tables."""
    parser = arguments(__doc__, tokens=24_576, eval_tokens=4_096)
    parser.add_argument("--guard-tokens", type=int, default=4_096, help="guards fit fewer numbers")
    parser.add_argument("--keep", default="0.1,0.2,0.5", help="shares of neurons kept")
    parser.add_argument("--capacity", default="0.05,0.1,0.2", help="shares put right by the guard")
    parser.add_argument("--predicted", default="0.2,0.8", help='the same with values="predicted"')
    parser.add_argument("--predictor", default="quantized_4", help="of both kinds of guard")
    parser.add_argument("--no-oracle", action="store_true", help="spare the guard that knows all")
    parser.add_argument("--results", type=Path, help="keep rows in this file, and go on from it")
    parser.add_argument("--plot", type=Path, help="write a picture of perplexity against keep")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    subject = load(args)

    settings = {
        "model": args.model, "text": Path(args.text).name, "eval_text": Path(args.eval_text).name,
        "tokens": args.tokens, "guard_tokens": args.guard_tokens, "eval_tokens": args.eval_tokens,
        **({"bos": False} if args.without_bos else {}),
        **({"predictor": args.predictor} if args.predictor != "quantized_4" else {}),
    }  # fmt: skip
    results = Results(args.results, settings)

    def row(form: str, share: float, make: Callable[[float], dict[str, Any]]) -> dict[str, Any]:
        """Return a row, measured if the file does not have it."""
        made = results.row(f"{form} {share:g}", lambda: {"share": share, **make(share)})
        Console(stderr=True).log(f"{form} {share:g}: perplexity {made['perplexity']:.2f}")
        return made

    def fit(**form: Any) -> Plan:
        tokens = args.guard_tokens if "guard" in form else args.tokens
        config = nbl.Config(attention=None, ffn=nbl.FFN(max_nmse=EVERY, **form))
        return nbl.calibrate(subject.model, subject.batches(tokens), config, progress=False)

    def measure(plan: Plan) -> float:
        torch._dynamo.reset()  # compiled code of former plans would hold all of them in memory
        return subject.perplexity(plan)

    def static(share: float) -> dict[str, Any]:
        plan = fit(keep=share)
        return {**errors(plan), "perplexity": measure(plan)}

    def guarded(share: float) -> dict[str, Any]:
        plan = fit(keep=0.0, guard="predicted", capacity=share, predictor=args.predictor)
        recall = sum(site.details["recall"] for site in plan.sites) / len(plan.sites)
        row = {**errors(plan), "perplexity": measure(plan), "recall": recall}
        if args.no_oracle:
            return row
        oracle = fit(keep=0.0, guard="predicted", capacity=share, predictor="none")
        pairs = zip(plan.sites, oracle.sites, strict=True)
        ratios = [ours.holdout_nmse / best.holdout_nmse for ours, best in pairs]
        return {**row, "oracle": errors(oracle), "worst_ratio": max(ratios)}

    def predicted(share: float) -> dict[str, Any]:
        plan = fit(
            keep=0.0, guard="predicted", capacity=share, predictor=args.predictor,
            values="predicted",
        )  # fmt: skip
        return {**errors(plan), "perplexity": measure(plan)}

    dense = row("dense", 1.0, lambda _: {"perplexity": measure(Plan())})["perplexity"]
    forms = {
        "static set kept": (static, args.keep),
        "guard": (guarded, args.capacity),
        "guard, predicted values": (predicted, args.predicted),
    }
    tables = {
        name: [row(name, share, make) for share in numbers(shares)]
        for name, (make, shares) in forms.items()
    }
    if args.plot:
        plot(tables, dense, args.plot)
    if args.json:
        print(json.dumps({"dense": dense, **tables}, indent=2))
        return
    kept, put_right, by_prediction = tables.values()
    console = Console()
    console.print(f"{args.model}, all FFNs folded; dense perplexity {dense:.1f}")
    console.print(
        share_table("a static set kept", "kept", kept, dense),
        guarded_table(put_right, dense),
        share_table('a guard with values="predicted"', "put right", by_prediction, dense),
    )


def _range(row: dict[str, float]) -> str:
    return f"{row['least']:.3f} – {row['greatest']:.3f} ({row['median']:.3f})"


def share_table(title: str, share: str, rows: list[dict[str, Any]], dense: float) -> Table:
    """Return a table of one form, a row a share of the neurons."""
    table = Table(share, "held-out NMSE (median)", "bytes read", "perplexity", "/ dense",
                  title=title, title_justify="left")  # fmt: skip
    for row in rows:
        table.add_row(
            f"{row['share']:.0%}", _range(row), f"{row['bytes']:.1%}", f"{row['perplexity']:.1f}",
            f"{row['perplexity'] / dense:.2f}×",
        )  # fmt: skip
    return table


def guarded_table(rows: list[dict[str, Any]], dense: float) -> Table:
    """Return the table of guards."""
    title = "no neuron kept, a guard puts some right"
    table = Table(title=title, title_justify="left")
    for name in ("put right", "NMSE, predictor", "NMSE, oracle", "worst ratio", "recall",
                 "bytes read", "perplexity", "/ dense"):  # fmt: skip
        table.add_column(name)
    for row in rows:
        table.add_row(
            f"{row['share']:.0%}", _range(row),
            _range(row["oracle"]) if "oracle" in row else "–",
            f"{row['worst_ratio']:.2f}" if "oracle" in row else "–", f"{row['recall']:.2f}",
            f"{row['bytes']:.1%}",
            f"{row['perplexity']:.1f}", f"{row['perplexity'] / dense:.2f}×",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    main()
