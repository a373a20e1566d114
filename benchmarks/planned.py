"""A planned model: how long planning takes, what the plan loses, how fast it really is.

    python benchmarks/planned.py --text calibration.jsonl --eval-text held_out.txt --max-loss 0.1

Prints the front, and by bisection the perplexity of some of its plans on text that planning never
saw. Then decode speed against the dense model compiled by Inductor, interleaved, in the same run:
of the plan that was chosen, and of the fastest one that stays within the budget on that text too;
each alone and on int8 weights (``plan_speed.py``).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from decoder_texts import arguments, load
from plan_speed import report
from rich.console import Console

import nbl_compiler as nbl
from nbl_compiler.plans import Plan


def main() -> None:
    """Plan, evaluate, measure."""
    parser = arguments(__doc__, tokens=24_576, eval_tokens=8_192)
    parser.add_argument("--max-loss", type=float, default=0.1)
    parser.add_argument("--int8", action="store_true", help="for int8 weights")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--decode", default="512,4096", help="contexts to measure at")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", type=Path, help="keep the plan, and the other one beside it")
    parser.add_argument("--plot", type=Path, help="draw the front")
    args = parser.parse_args()
    subject = load(args)
    model, batches = subject.model, subject.batches()
    started = time.perf_counter()
    budget = nbl.Budget(max_loss=args.max_loss, context=args.context, int8=args.int8)
    front = nbl.plan(model, batches, budget)
    minutes = (time.perf_counter() - started) / 60
    console = Console()
    console.print(front.table())
    console.print(f"planned in {minutes:.1f} minutes")
    if args.save:
        front.plan.save(args.save)
    if args.plot:
        front.save_plot(args.plot)
    dense = subject.perplexity(Plan())
    console.print(f"dense perplexity {dense:.2f}")

    def relative(number: int) -> float:
        value = subject.perplexity(front.plan_at(number)) / dense
        loss = front.points[number].loss
        console.print(f"{number:3}  {loss:7.2%} on trial text, perplexity {value:.3f}×")
        return value

    within = fastest_within(relative, front.chosen, len(front.points), 1 + args.max_loss)
    if args.save and within is not None:
        front.plan_at(within).save(args.save.with_stem(f"{args.save.stem}-within"))
    contexts = [int(n) for n in args.decode.split(",") if n]
    for number in sorted({front.chosen, within} - {None}):
        console.print(f"plan {number}")
        report(subject, front.plan_at(number), contexts, args.repeats)


def fastest_within(
    relative: Callable[[int], float], first: int, points: int, limit: float
) -> int | None:
    """Return the last point within a limit, by bisection: losses grow along the front.

    Args:
        relative: Point → what it loses.
        first: The point to begin at.
        points: How many there are.
        limit: What may be lost.
    """
    low, high, middle = -1, points, first
    while high - low > 1:
        if relative(middle) <= limit:
            low = middle
        else:
            high = middle
        middle = (low + high) // 2
    return low if low >= 0 else None


if __name__ == "__main__":
    main()
