"""See why a site is left alone: T5's cross-attention, on a tiny model with random weights.

python examples/inspect_rejected.py
"""

from __future__ import annotations

import torch
from transformers import T5Config, T5ForConditionalGeneration

import nbl_compiler as nbl

config = T5Config(
    vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4
)
model = T5ForConditionalGeneration(config).eval()
ids = torch.arange(2, 18).view(1, 16)

report = nbl.explain(model, input_ids=ids, decoder_input_ids=ids, use_cache=False)
print(report)
for row in report.rows:
    if row.state == "rejected":
        print(f"\n{row.site}\n  why:   {row.reason}\n  node:  {row.node}\n  where: {row.source}")
