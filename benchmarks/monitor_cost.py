"""What ``nbl.monitor`` costs: decoding with and without it, interleaved, medians.

    python benchmarks/monitor_cost.py --count 12 --ffn 24 --context 512
    python benchmarks/monitor_cost.py --layers 2 --width 64 --vocabulary 500 --context 16

Random weights in the shape of Qwen2.5-0.5B and a random plan: neither changes the time. Refuses to
time what does not count every token, or changes the logits.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from bench.random_plans import random_plan
from bench.shapes import QWEN_05B
from rich.console import Console
from rich.table import Table
from torch import nn

import nbl_compiler as nbl
from nbl_compiler import speed
from nbl_compiler.monitoring.statistics import input_statistics
from nbl_compiler.plans import Plan
from nbl_compiler.timing import Timing, seconds_of

# Logits of a random model are of order one; counting must not change them but for the order in
# which fused kernels round.
TOLERANCE = 1e-4
# The goal: decoding must not take longer than this times what it takes unmonitored.
GOAL = 1.02


def with_statistics(plan: Plan) -> Plan:
    """Return the plan with a standard normal distribution of every site's inputs."""
    for site in plan.rewritten:
        width = site.tensors["weight"].shape[1]
        site.inputs.update(input_statistics(torch.zeros(width), torch.ones(width)))
    return plan


def decode_call(fast: Callable[..., Any], kv: Any, context: int, steps: int) -> Callable[[], Any]:
    """Return a function that decodes ``steps`` tokens behind ``context`` and returns logits."""
    token = torch.full((1, 1), 7)

    def run() -> Any:
        speed.set_length(kv, context)
        for _ in range(steps):
            made = fast(input_ids=token, past_key_values=kv)
        return made.logits

    return run


def measure(model: nn.Module, plan: Plan, args: argparse.Namespace) -> dict[str, Timing]:
    """Return seconds a decoded token, without and with a monitor."""
    options = {"plan": plan, "lowering": args.lowering}
    fast = torch.compile(model, backend="nbl", options=options)
    kv = nbl.cache(model, plan, max_cache_len=args.context + args.steps + 2)
    speed.set_up(kv, fast, batch=1)
    run = decode_call(fast, kv, args.context, args.steps)
    m = nbl.monitor(fast, warn=False)
    run()
    plain = run()
    with m:
        run()  # compiles the second variant
        m.reset()
        seen = run()
    torch.testing.assert_close(seen, plain, rtol=TOLERANCE, atol=TOLERANCE)
    counted = {row.tokens for row in m.report()}
    if counted != {args.steps}:
        raise RuntimeError(f"the monitor counted {counted} tokens, {args.steps} were decoded")
    seconds: dict[str, list[float]] = {"plain": [], "monitored": []}
    for _ in range(args.repeats):  # in turn, so that a drift of the machine hits both
        seconds["plain"].append(seconds_of(run) / args.steps)
        with m:
            seconds["monitored"].append(seconds_of(run) / args.steps)
    return {name: Timing(tuple(runs)) for name, runs in seconds.items()}


def main() -> None:
    """Print both times, their ratio and the goal."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=12, help="attention layers to linearize")
    parser.add_argument("--ffn", type=int, default=24, help="FFNs to fold")
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--layers", type=int, default=QWEN_05B["num_hidden_layers"])
    parser.add_argument("--width", type=int, default=QWEN_05B["hidden_size"], help="hidden size")
    parser.add_argument("--vocabulary", type=int, default=QWEN_05B["vocab_size"])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=16, help="tokens a timed run decodes")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--lowering", default="inductor")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    shape = {**QWEN_05B, "num_hidden_layers": args.layers, "vocab_size": args.vocabulary}
    if args.width != QWEN_05B["hidden_size"]:
        shape |= {"hidden_size": args.width, "intermediate_size": 5 * args.width,
                  "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    model = Qwen2ForCausalLM(Qwen2Config(**shape)).eval()
    count, ffn = min(args.count, args.layers), min(args.ffn, args.layers)
    plan = with_statistics(random_plan(model, count, ffn, args.keep))
    with speed.measuring():
        times = measure(model, plan, args)
    ratio = times["monitored"].median / times["plain"].median
    if args.json:
        facts = {k: {"median": t.median, "spread": t.spread} for k, t in times.items()}
        print(json.dumps({**facts, "ratio": ratio, "sites": len(plan.rewritten)}, indent=2))
        return
    table = Table(
        title=f"decode behind {args.context} tokens, {args.layers} layers, {count} attention "
        f"layers and {ffn} FFNs watched",
        title_justify="left",
        caption=f"monitored / plain: {ratio:.4f} (goal: below {GOAL})",
    )
    for name in ("", "ms a token", "spread"):
        table.add_column(name, justify="left" if not name else "right")
    for name, timing in times.items():
        table.add_row(name, f"{timing.median * 1e3:.3f}", f"{timing.spread:.1%}")
    Console().print(table)


if __name__ == "__main__":
    main()
