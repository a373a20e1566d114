"""Generate with a static KV cache that allocates nothing for linearized layers.

python examples/generate_static_cache.py --model gemma-3-270m --prompt "The capital of France is"
"""

from __future__ import annotations

import argparse

import torch

import nbl_compiler as nbl
from nbl_compiler.models import load_causal
from nbl_compiler.text import python_docs_parts

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="gemma-3-270m")
parser.add_argument("--prompt", default="The capital of France is")
parser.add_argument("--new-tokens", type=int, default=16)
parser.add_argument("--tokens", type=int, default=8_192)
parser.add_argument("--length", type=int, default=512)
parser.add_argument("--lowering", default="inductor")
args = parser.parse_args()

model, tokenizer = load_causal(args.model)
batches = nbl.token_batches(
    python_docs_parts()[0], tokenizer, tokens=args.tokens, length=args.length
)
plan = nbl.calibrate(model, batches, nbl.Config(attention=nbl.Attention(count=2)))

# `generate` calls the model's own forward, so that is what has to be compiled.
model.forward = torch.compile(
    model.forward, backend="nbl", options={"plan": plan, "lowering": args.lowering}
)
prompt = tokenizer(args.prompt, return_tensors="pt")
length = prompt["input_ids"].shape[1] + args.new_tokens
cache = nbl.cache(model, plan, max_cache_len=length)
with torch.inference_mode():
    ids = model.generate(
        **prompt, past_key_values=cache, max_new_tokens=args.new_tokens, do_sample=False
    )
print(tokenizer.decode(ids[0], skip_special_tokens=True))
print(f"KV cache: {nbl.cache_bytes(cache):,} bytes")
