"""What int8 costs in perplexity: the model's weights, and on top of them a plan's own matrices.

    python benchmarks/quantized_quality.py --tokens 16384 --eval-tokens 4096

A plan is calibrated on the model as it was loaded (Python's documentation); then torchao quantizes
the model. Both are measured on the same held-out text, with and without the plan.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import nbl_compiler as nbl
from nbl_compiler.evaluation.perplexity import evaluation_rows, perplexity
from nbl_compiler.models import load_causal
from nbl_compiler.passes.matrices import rounding_error
from nbl_compiler.text import python_docs_parts


def layers(text: str) -> tuple[int, ...]:
    """Read ``8,10``."""
    return tuple(int(part) for part in text.split(",") if part)


def compiled(model: nn.Module, **options: Any) -> Callable[..., Any]:
    """Compile without lowering, which quality does not depend on."""
    return torch.compile(model, backend="nbl", options={"lowering": "eager", **options})


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--attention", type=layers, default=(7, 16))
    parser.add_argument("--ffn", type=layers, default=(6, 8))
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--eval-tokens", type=int, default=4_096)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    model, tokenizer = load_causal(given.model)
    documents, held_out = python_docs_parts()
    attention, ffn = (
        nbl.Attention(layers=given.attention),
        nbl.FFN(layers=given.ffn, keep=given.keep),
    )
    batches = nbl.token_batches(documents, tokenizer, tokens=given.tokens)
    plan = nbl.calibrate(model, batches, nbl.Config(attention=attention, ffn=ffn))
    rows = evaluation_rows(held_out, tokenizer, tokens=given.eval_tokens)
    found: dict[str, float] = {}

    def measure(name: str, forward: Callable[..., Any]) -> None:
        with torch.inference_mode():
            found[name] = perplexity(forward, rows).perplexity

    measure("float32", model)
    measure("float32, plan", compiled(model, plan=plan))
    quantize_(model, Int8WeightOnlyConfig(set_inductor_config=False))
    measure("int8", model)
    measure("int8, plan in int8", compiled(model, plan=plan))
    measure("int8, plan in float32", compiled(model, plan=plan, quantize="off"))
    errors = {site.name: rounding_error(site) for site in plan.rewritten}
    if given.json:
        print(json.dumps({"perplexity": found, "rounding": errors}))
        return
    table = Table("weights", "perplexity", "/ float32", title=given.model)
    for name, value in found.items():
        table.add_row(name, f"{value:.3f}", f"{value / found['float32']:.4f}")
    Console().print(table)
    for name, error in errors.items():
        print(f"{name}: int8 is off by {100 * error:.2g} % of the norm")


if __name__ == "__main__":
    main()
