"""Fold the FFNs of a sentence encoder and compare its embeddings with the dense ones.

python examples/embed.py --model all-minilm-l6-v2
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import nbl_compiler as nbl
from nbl_compiler.models import resolve
from nbl_compiler.text import python_docs_parts

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="all-minilm-l6-v2")
parser.add_argument("--texts", type=int, default=96, help="texts to calibrate on")
parser.add_argument("--length", type=int, default=128)
parser.add_argument("--keep", type=float, default=0.5, help="share of the neurons kept dense")
parser.add_argument("--lowering", default="inductor")
args = parser.parse_args()

folder = resolve(args.model)
model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def batch(texts: list[str]) -> dict[str, Tensor]:
    """Return padded model inputs; padding never enters a fit."""
    return dict(
        tokenizer(texts, padding=True, truncation=True, max_length=args.length, return_tensors="pt")
    )


def embed(run: object, texts: list[str]) -> Tensor:
    """Return mean-pooled embeddings [texts, d] of length 1."""
    inputs = batch(texts)
    with torch.inference_mode():
        hidden = run(**inputs).last_hidden_state  # type: ignore[operator]
    mask = inputs["attention_mask"][..., None]
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


fit_on, held_out = python_docs_parts()
batches = [batch(fit_on[i : i + 16]) for i in range(0, min(args.texts, len(fit_on)), 16)]
everything = nbl.FFN(keep=args.keep, max_nmse=1e9)
plan = nbl.calibrate(model, batches, nbl.Config(attention=None, ffn=everything))
print(plan)

fast = torch.compile(model, backend="nbl", options={"plan": plan, "lowering": args.lowering})
texts = held_out[:8]
cosine = (embed(fast, texts) * embed(model, texts)).sum(-1)
print(f"cosine with the dense embeddings: mean {cosine.mean():.3f}, least {cosine.min():.3f}")
