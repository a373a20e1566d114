"""What calibration costs: throughput beside the plain forward pass, memory against tokens.

    python benchmarks/calibration_cost.py

Random weights of two widths; both passes run the body only (logits of the last position).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time

import psutil
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from nbl_compiler.calibration import observe_model
from nbl_compiler.config import Config


def build(width: int, layers: int = 6) -> LlamaForCausalLM:
    """Return a Llama with the usual proportions."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=width, intermediate_size=width * 8 // 3,
        num_hidden_layers=layers, num_attention_heads=width // 64, num_key_value_heads=width // 128,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def throughput(width: int, rounds: int = 3) -> dict[str, float]:
    """Return tokens/s of the plain forward pass and of calibration, interleaved medians.

    24,576 tokens, a usual calibration: tracing the model, a few seconds once, is part of it.
    """
    model = build(width)
    batches = [torch.randint(0, 4096, (4, 512)) for _ in range(12)]
    tokens = sum(b.numel() for b in batches)

    def plain() -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch, use_cache=False, logits_to_keep=1)

    def observed() -> None:
        observe_model(model, batches, Config(), progress=False, solve=False)

    plain(), observed()
    seconds: dict[str, list[float]] = {"plain": [], "observed": []}
    for _ in range(rounds):
        for name, run in (("plain", plain), ("observed", observed)):
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    rates = {name: tokens / statistics.median(runs) for name, runs in seconds.items()}
    return {"width": width, **rates, "ratio": rates["observed"] / rates["plain"]}


def memory(tokens: int, width: int = 640) -> dict[str, float]:
    """Return the moments' bytes and the process's resident bytes after calibrating."""
    model = build(width)
    batches = (torch.randint(0, 4096, (4, 512)) for _ in range(tokens // 2048))
    observation = observe_model(model, batches, Config(), progress=False, solve=False).observation
    held = sum(s.train.nbytes + s.holdout.nbytes for s in observation.sites.values())
    gc.collect()
    return {"tokens": tokens, "moment_bytes": held, "rss_bytes": psutil.Process().memory_info().rss}


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rates = [throughput(width) for width in (640, 1024)]
    sizes = [memory(tokens) for tokens in (6_144, 51_200)]
    if args.json:
        print(json.dumps({"throughput": rates, "memory": sizes}, indent=2))
        return
    console = Console()
    speed = Table(title="tokens/s", title_justify="left")
    for name in ("width", "plain forward", "calibration", "ratio"):
        speed.add_column(name, justify="right")
    for row in rates:
        speed.add_row(
            f"{row['width']:.0f}", f"{row['plain']:,.0f}", f"{row['observed']:,.0f}",
            f"{row['ratio']:.2f}",
        )  # fmt: skip
    console.print(speed)
    size = Table(title="memory", title_justify="left")
    for name in ("tokens", "moments MB", "process MB"):
        size.add_column(name, justify="right")
    for row in sizes:
        size.add_row(
            f"{row['tokens']:,}",
            f"{row['moment_bytes'] / 1e6:.1f}",
            f"{row['rss_bytes'] / 1e6:.0f}",
        )
    console.print(size)


if __name__ == "__main__":
    main()
