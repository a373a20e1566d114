"""A pass of your own in the pipeline: take out dropouts that drop nothing.

    python examples/own_pass.py

It gets the same verification, timing, logs and dumps as the built-in passes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.fx import GraphModule
from transformers import GPT2Config, GPT2LMHeadModel

import nbl_compiler as nbl


@dataclass(frozen=True)
class DropInactiveDropout:
    """`dropout(x, p, training=False)` is x."""

    name: str = "drop_inactive_dropout"
    before: str = "match_attention"  # where it runs; by default after all rewrites

    def __call__(self, graph_module: GraphModule) -> nbl.PassReport:
        gone = 0
        for node in graph_module.graph.find_nodes(op="call_function", target=F.dropout):
            training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)
            if training is False:
                node.replace_all_uses_with(node.args[0])
                graph_module.graph.erase_node(node)
                gone += 1
        return nbl.PassReport(notes=(f"{gone} dropouts gone",))


model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)).eval()
ids = torch.arange(16).view(1, 16)
options = {
    "plan": nbl.Plan(),  # nothing to rewrite: this is about the pass alone
    "passes": [DropInactiveDropout()],
    "lowering": "eager",
    "report": lambda graph: [print(f"{run.name}: {run.report.notes}") for run in graph.runs],
}
fast = torch.compile(model, backend="nbl", options=options)
with torch.inference_mode():
    same = torch.equal(fast(ids).logits, model(ids).logits)
print(f"same logits: {same}")
