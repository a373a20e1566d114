"""``nbl demo``: the whole main job on one real pretrained model, reported in one table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.table import Table

from nbl_compiler import speed
from nbl_compiler.calibration import calibrate
from nbl_compiler.config import FFN, Attention, Config
from nbl_compiler.evaluation.perplexity import evaluation_rows, perplexity
from nbl_compiler.generate import greedy
from nbl_compiler.machine import Probe
from nbl_compiler.models import hidden_size, load_causal
from nbl_compiler.plans import Plan
from nbl_compiler.resident import release, resident_bytes
from nbl_compiler.text import python_docs_parts, token_batches

PROMPT = "The capital of France is"


@dataclass(frozen=True)
class DemoOptions:
    """Sizes of the demo; the defaults take a few minutes on two cores."""

    model: str = "gemma-3-270m"
    count: int = 4
    ffn_count: int = 4
    keep: float = 0.5
    tokens: int = 16_384
    eval_tokens: int = 4_096
    prefill: int = 512
    contexts: tuple[int, ...] = (2048,)
    new_tokens: int = 24


@dataclass
class DemoResult:
    """Everything the demo measured, for the table and for ``--json``."""

    model: str
    layers: str
    perplexity: tuple[float, float]
    eval_tokens: int
    rows: list[speed.SpeedRow]
    parameters: tuple[int, int]
    resident_bytes: tuple[int, int, int]
    head_parameters: int
    compile_seconds: tuple[float, float]
    text: tuple[str, str]
    plan: Plan = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        values = {k: v for k, v in self.__dict__.items() if k not in ("rows", "plan")}
        values["rows"] = [{**asdict(row), "speedup": row.speedup} for row in self.rows]
        return values


def run(options: DemoOptions, *, progress: bool = True) -> DemoResult:
    """Calibrate, compile with Inductor, measure both, generate with both."""
    model, tokenizer = load_causal(options.model)
    calibration, held_out = python_docs_parts()
    batches = token_batches(calibration, tokenizer, tokens=options.tokens)
    # Trials would choose better FFNs, but take four of the ten minutes that a demo may.
    folded = FFN(count=options.ffn_count, keep=options.keep, rank_by="nmse")
    config = Config(
        attention=Attention(count=options.count, mixed=True) if options.count else None,
        ffn=folded if options.ffn_count else None,
    )
    plan = calibrate(model, batches, config, progress=progress)
    rows = evaluation_rows(held_out, tokenizer, tokens=options.eval_tokens)
    vocabulary = model.config.vocab_size
    with speed.measuring():
        rates = Probe(hidden_size(model))
        pair = speed.contenders(model, plan)
        dense, nbl = pair
        measured = [speed.prefill(pair, vocabulary, options.prefill, rates)]
        measured += [speed.decode(pair, vocabulary, c, rates) for c in options.contexts]
        seconds = (dense.compile_seconds, nbl.compile_seconds)
    # What is predicted does not depend on the lowering; not compiling again spares minutes.
    eager: dict[str, Any] = {"plan": plan, "lowering": "eager"}
    linearized = torch.compile(model, backend="nbl", options=eager)
    before = perplexity(model, rows, progress=progress)
    after = perplexity(linearized, rows, progress=progress)
    texts = [
        _generate(forward, contender.make_cache, tokenizer, options.new_tokens)
        for forward, contender in ((model, dense), (linearized, nbl))
    ]
    # Last, since the dense model cannot run any more.
    held = resident_bytes(model, plan)
    dense_bytes = resident_bytes(model)
    freed = release(model, plan).bytes
    return DemoResult(
        model=options.model,
        layers=_summary(plan, options.keep),
        perplexity=(before.perplexity, after.perplexity),
        eval_tokens=before.tokens,
        rows=measured,
        parameters=speed.parameters_touched(model, plan),
        resident_bytes=(dense_bytes, held, held - freed),
        head_parameters=_head_parameters(model),
        compile_seconds=seconds,
        text=(texts[0], texts[1]),
        plan=plan,
    )


def _summary(plan: Plan, keep: float) -> str:
    parts = []
    for kind, what in (
        ("attention", "attention layers linearized"),
        ("ffn", f"FFNs folded with {keep:.0%} of their neurons kept"),
    ):
        sites = [site for site in plan.sites if site.kind == kind]
        done = sum(site.decision == "rewritten" for site in sites)
        if sites:
            parts.append(f"{done} of {len(sites)} {what}")
    return ", ".join(parts)


def _head_parameters(model: Any) -> int:
    head = model.get_output_embeddings()
    return 0 if head is None else int(head.weight.numel())


def _generate(
    forward: Callable[..., Any], make_cache: Callable[[int], Any], tokenizer: Any, new_tokens: int
) -> str:
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    kv = make_cache(ids.shape[1] + new_tokens)
    made = greedy(forward, ids, kv, new_tokens, tokenizer.eos_token_id)
    return str(tokenizer.decode(torch.cat([ids, made], 1)[0], skip_special_tokens=True))


def table(result: DemoResult) -> Table:
    """Return the one table: dense Inductor against nbl, same run."""
    shown = Table(title=f"{result.model}: {result.layers}", title_justify="left")
    for name in ("", "dense, inductor", "nbl, inductor", "ratio", "predicted"):
        shown.add_column(name, justify="left" if not name else "right")
    dense, nbl = result.perplexity
    shown.add_row(
        f"perplexity, {result.eval_tokens:,} held-out tokens", f"{dense:.2f}", f"{nbl:.2f}",
        f"{nbl / dense:.3f}×", "",
    )  # fmt: skip
    for row in result.rows:
        count = row.context if row.what == "prefill" else 1
        rates = [count / t.median for t in (row.dense, row.nbl)]
        shown.add_row(
            f"{row.what} tokens/s, {row.context:,} tokens", f"{rates[0]:,.1f}", f"{rates[1]:,.1f}",
            f"{row.speedup:.2f}×", f"{row.predicted:.2f}×",
        )  # fmt: skip
    for row in result.rows:
        if row.what == "decode":
            a, b = row.kv_bytes
            shown.add_row(
                f"KV-cache bytes, {row.context:,} tokens", f"{a:,}", f"{b:,}", f"{b / a:.3f}×", ""
            )
    a, b = result.parameters
    shown.add_row("parameters touched per token", f"{a:,}", f"{b:,}", f"{b / a:.3f}×", "")
    a, b, c = result.resident_bytes
    shown.add_row("resident bytes, weights and plan", f"{a:,}", f"{b:,}", f"{b / a:.3f}×", "")
    shown.add_row("… after nbl.release", "", f"{c:,}", f"{c / a:.3f}×", "")
    a_s, b_s = result.compile_seconds
    shown.add_row("compile seconds", f"{a_s:.1f}", f"{b_s:.1f}", f"{b_s / a_s:.2f}×", "")
    return shown


def notes(result: DemoResult) -> str:
    """Return what the table needs beside it to be read rightly."""
    share = result.head_parameters / max(result.parameters[0], 1)
    lines = [
        "Ratios are nbl to dense Inductor in this run; above 1 is faster for tokens/s. Predicted: "
        "roofline of both graphs.",
        f"The LM head is {share:.0%} of the parameters a token touches"
        + (", and no plan changes it: the rewrite itself gains" if share > 0.4 else ". It gains")
        + " more in prefill than in decode. On a CPU, most of the gain in decode comes from "
        "streamed products, which all linear layers get, the LM head included.",
        f"dense: {result.text[0]!r}",
        f"nbl:   {result.text[1]!r}",
    ]
    return "\n".join(lines)
