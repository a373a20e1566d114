"""A planned model: how long planning takes, what the plan loses, how fast it really is.

    python benchmarks/planned.py --text calibration.jsonl --eval-text held_out.txt --max-loss 0.1

Prints the front, then for the chosen plan the perplexity on text that planning never saw and the
decode speed against the dense model compiled by Inductor, interleaved, in the same run.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

import nbl_compiler as nbl
from nbl_compiler import speed
from nbl_compiler.cost import measure_machine
from nbl_compiler.evaluation.perplexity import perplexity_of
from nbl_compiler.models import hidden_size, load_causal
from nbl_compiler.plans import Plan
from nbl_compiler.text import TextSource, token_batches


def main() -> None:
    """Plan, evaluate, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--text", default="python-docs")
    parser.add_argument("--eval-text", default="python-docs")
    parser.add_argument("--tokens", type=int, default=24_576)
    parser.add_argument("--eval-tokens", type=int, default=8_192)
    parser.add_argument("--max-loss", type=float, default=0.1)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--decode", default="512,4096", help="contexts to measure at")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", type=Path, help="keep the plan")
    parser.add_argument("--plot", type=Path, help="draw the front")
    args = parser.parse_args()
    model, tokenizer = load_causal(args.model)
    batches = list(token_batches(TextSource(args.text).documents(), tokenizer, tokens=args.tokens))
    started = time.perf_counter()
    front = nbl.plan(model, batches, nbl.Budget(max_loss=args.max_loss, context=args.context))
    minutes = (time.perf_counter() - started) / 60
    console = Console()
    console.print(front.table())
    console.print(f"planned in {minutes:.1f} minutes")
    if args.save:
        front.plan.save(args.save)
    if args.plot:
        front.save_plot(args.plot)
    documents = list(TextSource(args.eval_text).documents())
    dense, planned = (
        perplexity_of(model, tokenizer, plan, documents, args.eval_tokens)
        for plan in (Plan(), front.plan)
    )
    console.print(f"perplexity {dense:.2f} dense, {planned:.2f} planned: {planned / dense:.3f}×")
    table = Table("context", "dense ms", "nbl ms", "speed-up", "predicted", "spread")
    with speed.measuring():
        machine = measure_machine(width=hidden_size(model))
        pair = speed.contenders(model, front.plan)
        for context in (int(n) for n in args.decode.split(",") if n):
            row = speed.decode(pair, len(tokenizer), context, machine, args.repeats)
            table.add_row(
                str(context), f"{1e3 * row.dense.median:.1f}", f"{1e3 * row.nbl.median:.1f}",
                f"{row.speedup:.2f}×", f"{row.predicted:.2f}×",
                f"{max(row.dense.spread, row.nbl.spread):.0%}",
            )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    main()
