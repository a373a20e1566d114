"""Sentence embeddings of MiniLM-L6 with all FFNs folded, against the dense model's.

    python benchmarks/embedding_quality.py --text calibration.jsonl --eval-text held_out.txt

Prints the mean cosine between both embeddings (mean over real tokens, as the model is used) on
text that calibration never saw, and the share of the FFNs' bytes that one token reads.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import nbl_compiler as nbl
from nbl_compiler.models import MINILM, resolve
from nbl_compiler.text import TextSource

FORMS = {
    "keep 22 %": nbl.FFN(keep=0.22),
    "keep 10 %, put right 5 %": nbl.FFN(keep=0.10, guard="predicted", capacity=0.05),
    "put right 30 %, predicted values": nbl.FFN(
        keep=0.0, guard="predicted", capacity=0.30, values="predicted"
    ),
    "exact, ranges hold 90 %": nbl.FFN(keep=0.0, guard="exact", coverage=0.9),
}


def sentences(documents: Iterable[str], count: int) -> list[str]:
    """Return the first texts of a usable length."""
    pieces = (part.strip() for text in documents for part in text.split("\n"))
    usable = [part[:1000] for part in pieces if len(part) > 60]
    return usable[:count]


def batches(texts: list[str], tokenizer, size: int = 32) -> list[dict[str, Tensor]]:
    """Return padded batches of model inputs."""
    groups = [texts[i : i + size] for i in range(0, len(texts), size)]
    settings = {"padding": "longest", "truncation": True, "max_length": 256}
    return [dict(tokenizer(group, return_tensors="pt", **settings)) for group in groups]


def embed(forward: nn.Module, given: list[dict[str, Tensor]]) -> Tensor:
    """Return the mean over real tokens of the last hidden state, per text."""
    rows = []
    with torch.no_grad():
        for inputs in given:
            hidden = forward(**inputs).last_hidden_state
            mask = inputs["attention_mask"][..., None].to(hidden.dtype)
            rows.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.cat(rows)


def main() -> None:
    """Calibrate each form and print its cosine and bytes."""
    from transformers import AutoModel, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=MINILM)
    parser.add_argument("--text", default="python-docs")
    parser.add_argument("--eval-text", default="python-docs")
    parser.add_argument("--texts", type=int, default=192, help="for calibration")
    parser.add_argument("--eval-texts", type=int, default=64)
    parser.add_argument("--forms", help="some of them, such as 1,3; by default all")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    path = resolve(args.model)
    model, tokenizer = AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    known = sentences(TextSource(args.text).documents(), args.texts)
    pool = sentences(TextSource(args.eval_text).documents(), args.texts + args.eval_texts)
    unseen = [text for text in pool if text not in set(known)][: args.eval_texts]
    calibration, held_out = batches(known, tokenizer), batches(unseen, tokenizer)
    dense = embed(model, held_out)
    rows = []
    wanted = [int(item) for item in args.forms.split(",")] if args.forms else range(len(FORMS))
    for name, ffn in (list(FORMS.items())[place] for place in wanted):
        every = nbl.FFN(**{**vars(ffn), "max_nmse": 1e9})  # no error is too large: all are folded
        config = nbl.Config(attention=None, ffn=every)
        plan = nbl.calibrate(model, calibration, config, progress=False)
        torch._dynamo.reset()
        options = {"plan": plan, "lowering": "eager"}
        made = embed(torch.compile(model, backend="nbl", options=options), held_out)
        cosine = F.cosine_similarity(dense, made)
        read = sum(s.details["parameters_read"] for s in plan.sites)
        share = read / sum(s.details["parameters"] for s in plan.sites)
        worst = max(s.holdout_nmse for s in plan.sites)
        rows.append({"form": name, "cosine": float(cosine.mean()), "least": float(cosine.min()),
                     "bytes": share, "worst_nmse": worst})  # fmt: skip
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    table = Table(title=f"{args.model}: all FFNs folded", title_justify="left")
    for column in ("form", "mean cosine", "least", "bytes read", "worst held-out NMSE"):
        table.add_column(column, justify="left" if column == "form" else "right")
    for row in rows:
        table.add_row(
            row["form"], f"{row['cosine']:.4f}", f"{row['least']:.3f}", f"{row['bytes']:.1%}",
            f"{row['worst_nmse']:.3f}",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
