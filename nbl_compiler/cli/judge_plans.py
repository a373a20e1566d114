"""``nbl explain``, ``nbl eval`` and ``nbl bench``: what a plan does, costs and gains."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nbl_compiler.cli.shared import (
    Column,
    Device,
    Dtype,
    GuardTokens,
    Json,
    Lowering,
    Model,
    PlanFile,
    Quiet,
    Split,
    Text,
    console,
    numbers,
    print_json,
)


def explain(
    model: Model,
    plan: Annotated[Path | None, typer.Option(help="Plan to apply.")] = None,
    attention: Annotated[str, typer.Option(help="Attention implementation.")] = "sdpa",
    length: Annotated[int, typer.Option(help="Tokens of the example input.")] = 8,
    measure: Annotated[bool, typer.Option("--measure", help="Time every rewritten site.")] = False,
    html: Annotated[Path | None, typer.Option(help="Also write a report to open here.")] = None,
    lowering: Lowering = "inductor",
    as_json: Json = False,
) -> None:
    """Say which sites match, which a plan rewrites, and why the others are left alone."""
    import torch

    from nbl_compiler.explanation import explain as run
    from nbl_compiler.models import load_causal
    from nbl_compiler.plans import Plan

    loaded, _ = load_causal(model)
    loaded.set_attn_implementation(attention)
    ids = torch.ones(1, length, dtype=torch.long)
    report = run(
        loaded, ids, plan=Plan.load(plan) if plan else None, measure=measure, lowering=lowering,
        use_cache=False,
    )  # fmt: skip
    if html is not None:
        report.save_html(html)
    if as_json:
        print_json(report.as_json())
    else:
        for part in report.tables(console.width):
            console.print(part, highlight=False, markup=False)
        if html is not None:
            console.print(f"written to {html}")


def evaluate(
    model: Model,
    plan: PlanFile,
    text: Text = "python-docs",
    column: Column = "text",
    split: Split = "validation",
    tokens: Annotated[int, typer.Option(help="Evaluation tokens at each length.")] = 16_384,
    length: Annotated[str, typer.Option(help="Tokens a row; several as 128,512,2048.")] = "512",
    drop: Annotated[bool, typer.Option(help="Also drop the same layers, for comparison.")] = False,
    prompts: Annotated[int, typer.Option(help="Prompts to continue with both.")] = 0,
    new_tokens: Annotated[int, typer.Option(help="Tokens to add to a prompt.")] = 64,
    tasks: Annotated[str, typer.Option(help="Tasks of lm-evaluation-harness, a,b,c.")] = "",
    task_folder: Annotated[Path | None, typer.Option(help="Folder of further task files.")] = None,
    task_limit: Annotated[int | None, typer.Option(help="Documents a task, at most.")] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    lowering: Lowering = "eager",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Quality of a plan against the dense model, on text you name."""
    from nbl_compiler.evaluation.evaluate_plan import evaluate_plan
    from nbl_compiler.models import load_causal
    from nbl_compiler.plans import Plan
    from nbl_compiler.text import TextSource

    lengths = numbers(length)
    loaded, tokenizer = load_causal(model, dtype, device)
    found = evaluate_plan(
        loaded, tokenizer, Plan.load(plan), TextSource(text, split, column).documents(),
        tokens=tokens, lengths=lengths, drop=drop, prompts=prompts, new_tokens=new_tokens,
        tasks=[name for name in tasks.split(",") if name], task_folder=task_folder,
        task_limit=task_limit, lowering=lowering, progress=not quiet,
    )  # fmt: skip
    if as_json:
        print_json(found.as_json())
    else:
        for table in found.tables():
            console.print(table, highlight=False, markup=False)


def bench(
    model: Model,
    plan: PlanFile,
    prefill: Annotated[str, typer.Option(help="Prompt lengths.")] = "512",
    decode: Annotated[str, typer.Option(help="Context lengths.")] = "512,2048",
    dtype: Dtype = "float32",
    device: Device = "cpu",
    guard_tokens: GuardTokens = None,
    as_json: Json = False,
) -> None:
    """Time prefill and decode against dense Inductor, same run, interleaved."""
    from nbl_compiler import speed
    from nbl_compiler.machine import Probe
    from nbl_compiler.models import hidden_size, load_causal
    from nbl_compiler.plans import Plan
    from nbl_compiler.speed_table import as_rows, speed_table

    loaded, _ = load_causal(model, dtype, device)
    size = loaded.config.vocab_size
    with speed.measuring():
        made = Plan.load(plan)
        codes = any(site.guarded for site in made.rewritten)
        rates = Probe(hidden_size(loaded), codes=codes)
        pair = speed.contenders(loaded, made, guard_tokens=guard_tokens)
        rows = [speed.prefill(pair, size, n, rates) for n in numbers(prefill)]
        rows += [speed.decode(pair, size, n, rates) for n in numbers(decode)]
        seconds = [c.compile_seconds for c in pair]
    if as_json:
        print_json({"rows": as_rows(rows), "compile_seconds": seconds})
    else:
        console.print(speed_table(rows))
        console.print(f"compile seconds: dense {seconds[0]:.1f}, nbl {seconds[1]:.1f}")
