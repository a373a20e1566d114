"""What a plan gains in decoding, alone and on int8 weights, and what it loses.

    python benchmarks/plan_speed.py plan.safetensors --eval-text held_out.txt --decode 512,4096

Interleaved in one run, as contenders of the benchmark: the dense model compiled by Inductor; a plan
that changes nothing, with which the products of few tokens are streamed all the same; the plan; and
the plan on a model whose linear layers torchao quantized to int8 (but for FFNs that the plan
guards, which gather rows of float weights). Perplexity is on text that planning never saw.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import decoder_texts
from bench import quality, speed_points
from bench.contenders import CONTENDERS, HERE, Contender, Made
from bench.speed_points import DENSE, Point
from bench.subjects import Subject
from rich.console import Console
from rich.table import Table

import nbl_compiler as nbl
from nbl_compiler import speed
from nbl_compiler.evaluation.perplexity import evaluation_rows
from nbl_compiler.machine import Probe
from nbl_compiler.models import hidden_size
from nbl_compiler.plans import Plan
from nbl_compiler.shared_copy import int8_copy


def contenders(plan: Plan) -> list[Contender]:
    """Return who is compared, the dense model first."""
    guarded = [site.name for site in plan.rewritten if site.guarded]

    def alone(subject: Subject, _: float) -> Made:
        return Made(subject.model, plan)

    def int8_alone(subject: Subject, _: float) -> Made:
        return Made(int8_copy(subject.model), Plan())

    def on_int8(subject: Subject, _: float) -> Made:
        return Made(int8_copy(subject.model, leave=guarded), plan)

    picks = bool(guarded)
    return [
        CONTENDERS[DENSE],
        CONTENDERS["empty plan"],
        Contender("plan", "ffn", HERE, alone, picks=picks),
        Contender("empty plan on int8 weights", "weights", HERE, int8_alone),
        Contender("plan on int8 weights", "weights", HERE, on_int8, picks=picks),
    ]


def report(texts: decoder_texts.Subject, plan: Plan, contexts: Sequence[int], repeats: int) -> None:
    """Print what each contender loses, and a table for each context as soon as it is measured.

    Args:
        texts: The model and its texts.
        plan: Its plan.
        contexts: Tokens in the cache.
        repeats: Rounds.
    """
    model = texts.model
    rows = evaluation_rows(texts.documents, texts.tokenizer, tokens=texts.args.eval_tokens)
    subject = Subject(texts.args.model, model, batches=rows, rows=rows)  # nothing calibrates here
    compared, console = contenders(plan), Console()
    for one in compared[2:]:
        lost = quality.measure(one, subject, 0.0)["ratios"]["perplexity"]["value"]
        console.print(f"{one.name}: perplexity {lost:.3f}×")
    with speed.measuring():
        rates = Probe(hidden_size(model), codes=True)
        for context in contexts:
            point = Point("decode", context, fraction=0.0, repeats=repeats)
            found = speed_points.measure(point, subject, compared, rates)
            table = Table("", "ms a token", "spread", "speed-up", "predicted")
            table.title = f"decode, {context:,} tokens of context"
            for row in found.values():
                if "skipped" in row:
                    table.add_row(row["contender"], row["skipped"])
                    continue
                table.add_row(
                    row["contender"], f"{row['ms_per_token']:.1f}", f"{row['spread']:.0%}",
                    f"{row['ratios']['speed-up']['value']:.2f}×",
                    f"{row['predicted_speedup']:.2f}×",
                )  # fmt: skip
            console.print(table)


def main() -> None:
    """Parse the command line, measure, print."""
    parser = decoder_texts.arguments(__doc__, tokens=0, eval_tokens=8_192)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--decode", default="512,4096", help="contexts to measure at")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    contexts = [int(n) for n in args.decode.split(",")]
    report(decoder_texts.load(args), nbl.Plan.load(args.plan), contexts, args.repeats)


if __name__ == "__main__":
    main()
