"""Prefill and decode of a published shape with random weights, against dense Inductor.

    python benchmarks/model_speed.py --count 12 --prefill 2048 --decode 512,4096
    python benchmarks/model_speed.py --count 0 --ffn 24 --keep 0.25 --prefill 512 --decode 512

Speed does not depend on the values of the weights, so a random plan stands for a calibrated one.
Refuses to time what does not pass its numeric check.
"""

from __future__ import annotations

import argparse
import json

import torch
from bench.random_plans import random_plan
from bench.shapes import QWEN_05B, build
from rich.console import Console
from torch import nn

from nbl_compiler import speed
from nbl_compiler.machine import Probe
from nbl_compiler.plans import Plan
from nbl_compiler.speed_table import as_rows, speed_table

# Logits of a random model are of order one; a wrong rewrite misses by as much.
NUMERIC_TOLERANCE = 1e-3


def check(model: nn.Module, plan: Plan, pair: tuple[speed.Contender, speed.Contender]) -> None:
    """Compare the compiled plan with plain module surgery before anything is timed."""
    ids = torch.arange(1, 17)[None]
    linear, hooks = nn.functional.linear, []
    for site in plan.rewritten:
        module = model.get_submodule(site.name)

        def attention(module, args, kwargs, output, t=site.tensors):
            return linear(kwargs["hidden_states"], t["weight"], t["bias"]), None

        def ffn(module, args, kwargs, output, t=site.tensors):
            gate, up = (
                linear(args[0], p.weight[t["kept"]]) for p in (module.gate_proj, module.up_proj)
            )
            kept = linear(nn.functional.silu(gate) * up, t["down"])
            return kept + linear(args[0], t["weight"], t["bias"])

        hook = attention if site.kind == "attention" else ffn
        hooks.append(module.register_forward_hook(hook, with_kwargs=True))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    torch._dynamo.reset()
    torch.testing.assert_close(
        pair[1].forward(ids, use_cache=False).logits, expected,
        atol=NUMERIC_TOLERANCE, rtol=NUMERIC_TOLERANCE,
    )  # fmt: skip


def main() -> None:
    """Print measured and predicted speed-ups."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--ffn", type=int, default=0, help="FFNs to fold")
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--prefill", default="2048")
    parser.add_argument("--decode", default="512,4096")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    model = build("qwen2.5-0.5b-shape")
    plan = random_plan(model, args.count, args.ffn, args.keep)
    with speed.measuring():
        rates = Probe(QWEN_05B["hidden_size"])
        pair = speed.contenders(model, plan)
        check(model, plan, pair)
        size = QWEN_05B["vocab_size"]
        rows = []
        for context in (int(n) for n in args.decode.split(",") if n):
            rows.append(speed.decode(pair, size, context, rates, args.repeats))
        for length in (int(n) for n in args.prefill.split(",") if n):
            rows.append(speed.prefill(pair, size, length, rates, max(args.repeats // 2, 1)))
        seconds = [c.compile_seconds for c in pair]
    if args.json:
        print(json.dumps({"rows": as_rows(rows), "compile_seconds": seconds}, indent=2))
        return
    console = Console()
    console.print(
        f"shape of Qwen2.5-0.5B, {args.count} of 24 attention layers linearized, {args.ffn} FFNs "
        f"folded with {args.keep:.0%} kept"
    )
    console.print(speed_table(rows))
    console.print(f"compile seconds: dense {seconds[0]:.1f}, nbl {seconds[1]:.1f}")


if __name__ == "__main__":
    main()
