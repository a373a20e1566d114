"""``nbl generate``, ``nbl demo`` and ``nbl minify``: models and dumped graphs at work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nbl_compiler.cli.shared import (
    Device,
    Dtype,
    GuardTokens,
    Json,
    Lowering,
    Model,
    console,
    print_json,
)


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    plan: Annotated[Path | None, typer.Option(help="Plan; without it the dense model.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens to add, at most.")] = 32,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    lowering: Lowering = "inductor",
    guard_tokens: GuardTokens = None,
    as_json: Json = False,
) -> None:
    """Continue a prompt greedily."""
    import torch
    from transformers import StaticCache

    from nbl_compiler.generate import greedy
    from nbl_compiler.kv_cache import cache
    from nbl_compiler.models import load_causal
    from nbl_compiler.plans import Plan

    loaded, tokenizer = load_causal(model, dtype, device)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(device)
    length = ids.shape[1] + new_tokens
    options: dict[str, Any] = {
        "lowering": lowering,
        "plan": Plan.load(plan) if plan else Plan(),
        "guard_tokens": guard_tokens,
    }
    forward = torch.compile(loaded, backend="nbl", options=options)
    kv = (
        cache(loaded, options["plan"], length)
        if plan
        else StaticCache(config=loaded.config, max_cache_len=length)
    )
    made = greedy(forward, ids, kv, new_tokens, tokenizer.eos_token_id)
    text = tokenizer.decode(torch.cat([ids, made], 1)[0], skip_special_tokens=True)
    if as_json:
        print_json({"text": text, "new_tokens": made.shape[1]})
    else:
        console.print(text, markup=False)


def demo(
    model: Annotated[str, typer.Option(help="Any folder or hub id.")] = "gemma-3-270m",
    count: Annotated[int, typer.Option(help="Attention layers to linearize.")] = 4,
    ffn_count: Annotated[int, typer.Option(help="FFNs to fold.")] = 4,
    keep: Annotated[float, typer.Option(help="Share of their neurons that stay dense.")] = 0.5,
    tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = 16_384,
    plan: Annotated[Path | None, typer.Option(help="Also write the plan here.")] = None,
    as_json: Json = False,
) -> None:
    """Calibrate, compile, compare with dense Inductor, generate: all in one go."""
    from nbl_compiler import demo as show

    result = show.run(
        show.DemoOptions(model=model, count=count, ffn_count=ffn_count, keep=keep, tokens=tokens),
        progress=not as_json,
    )
    if plan is not None:
        result.plan.save(plan)
    if as_json:
        print_json(result.as_json())
    else:
        console.print(str(result.plan), highlight=False, markup=False)
        console.print(show.table(result))
        console.print(show.notes(result), highlight=False, markup=False)


def minify(
    dump: Annotated[Path, typer.Argument(help="A dumped file, a graph's folder, or all dumps.")],
    lowering: Annotated[str, typer.Option(help="aot_eager or inductor.")] = "aot_eager",
    tolerance: Annotated[
        float | None, typer.Option(help="Largest relative error; by default by the dtype.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Find the smallest part of a dumped graph that its lowering computes wrongly."""
    from nbl_compiler.minify import minify as run

    results = run(dump, lowering, tolerance, progress=not as_json)
    if as_json:
        print_json([result.as_json() for result in results])
    else:
        for result in results:
            console.print(str(result), highlight=False, markup=False, soft_wrap=True)
