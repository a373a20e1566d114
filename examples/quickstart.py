"""Calibrate a model, save the plan, compile with it, and see what it costs and gains.

python examples/quickstart.py --model gemma-3-270m
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import nbl_compiler as nbl
from nbl_compiler.evaluation.perplexity import evaluation_rows, perplexity
from nbl_compiler.models import load_causal
from nbl_compiler.text import python_docs_parts

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="gemma-3-270m", help="a folder, a hub id, or gemma-3-270m")
parser.add_argument("--tokens", type=int, default=8_192)
parser.add_argument("--length", type=int, default=512)
parser.add_argument("--count", type=int, default=2, help="attention layers to linearize")
parser.add_argument("--plan", type=Path, default=Path("plan.safetensors"))
parser.add_argument("--lowering", default="inductor")
args = parser.parse_args()

model, tokenizer = load_causal(args.model)
fit_on, held_out = python_docs_parts()  # help texts that come with Python

batches = nbl.token_batches(fit_on, tokenizer, tokens=args.tokens, length=args.length)
plan = nbl.calibrate(model, batches, nbl.Config(attention=nbl.Attention(count=args.count)))
plan.save(args.plan)
print(plan)

rows = evaluation_rows(held_out, tokenizer, tokens=args.tokens // 4, length=args.length)
for name, used in (("dense", nbl.Plan()), ("linearized", args.plan)):
    fast = torch.compile(model, backend="nbl", options={"plan": used, "lowering": args.lowering})
    print(f"{name}: perplexity {perplexity(fast, rows).perplexity:.2f} on text the fit never saw")
