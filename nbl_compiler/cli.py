"""The command line: ``nbl calibrate | explain | eval | generate | bench | demo | minify``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from nbl_compiler.errors import ConfigError, NBLError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make a pretrained transformer faster without fine-tuning it.",
)
console = Console()

Model = Annotated[str, typer.Argument(help="A folder, a hub id, or gemma-3-270m (packaged).")]
PlanFile = Annotated[Path, typer.Argument(help="Plan file (safetensors).")]
Text = Annotated[
    str, typer.Option(help="A .txt/.jsonl/.csv/.parquet file, a hub data set, or python-docs.")
]
Column = Annotated[str, typer.Option(help="Column of the data set that holds the text.")]
Split = Annotated[str, typer.Option(help="Split of a hub data set.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
Lowering = Annotated[str, typer.Option(help="inductor, aot_eager or eager.")]


@app.command()
def calibrate(
    model: Model,
    plan: PlanFile,
    text: Text = "python-docs",
    column: Column = "text",
    split: Split = "train",
    tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = 32_768,
    length: Annotated[int, typer.Option(help="Tokens a row.")] = 512,
    batch: Annotated[int, typer.Option(help="Rows a batch.")] = 4,
    attention: Annotated[bool, typer.Option(help="Linearize attention layers.")] = True,
    count: Annotated[int | None, typer.Option(help="Linearize the best COUNT layers.")] = None,
    layers: Annotated[str | None, typer.Option(help="Linearize these, such as 3,5,8.")] = None,
    max_nmse: Annotated[float | None, typer.Option(help="Leave layers with more error.")] = None,
    rank_by: Annotated[str, typer.Option(help="nmse, loss or cca.")] = "nmse",
    input: Annotated[str, typer.Option(help="normed or residual.")] = "normed",
    taps: Annotated[int, typer.Option(help="Earlier values that a map also reads.")] = 0,
    averages: Annotated[bool, typer.Option(help="With taps: averages of values, too.")] = True,
    ridge: Annotated[str, typer.Option(help="auto, or a number of at least 0.")] = "auto",
    ffn: Annotated[bool, typer.Option("--ffn", help="Fold FFNs, too.")] = False,
    ffn_count: Annotated[int | None, typer.Option(help="Fold the best COUNT FFNs.")] = None,
    ffn_layers: Annotated[str | None, typer.Option(help="Fold these, such as 3,5,8.")] = None,
    ffn_max_nmse: Annotated[float | None, typer.Option(help="Leave FFNs with more error.")] = None,
    ffn_rank_by: Annotated[str, typer.Option(help="loss or nmse.")] = "loss",
    keep: Annotated[float, typer.Option(help="Share of the neurons that stay dense.")] = 0.25,
    guard: Annotated[str, typer.Option(help="off, predicted or exact.")] = "off",
    capacity: Annotated[float | None, typer.Option(help="Most outliers, a share.")] = None,
    coverage: Annotated[float, typer.Option(help="In-range target, guard exact.")] = 0.9,
    predictor: Annotated[
        str, typer.Option(help="auto, none, low_rank, quantized_8, quantized_4 or quantized_2.")
    ] = "auto",
    values: Annotated[
        str, typer.Option(help="original or predicted: what outliers are put right with.")
    ] = "original",
    dtype: Dtype = "float32",
    device: Device = "cpu",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Calibrate a model on text and write the plan."""
    from nbl_compiler.calibration import calibrate as run
    from nbl_compiler.config import FFN, Attention, Config
    from nbl_compiler.models import load_causal
    from nbl_compiler.text import TextSource, token_batches

    linearize = Attention(
        count, _layers(layers), max_nmse, rank_by, input,  # type: ignore[arg-type]
        taps=taps, averages=averages,
    )  # fmt: skip
    fold = FFN(
        ffn_count, _layers(ffn_layers), ffn_max_nmse, keep, guard, capacity, coverage, predictor,  # type: ignore[arg-type]
        values=values, rank_by=ffn_rank_by,  # type: ignore[arg-type]
    )  # fmt: skip
    asked = ffn or ffn_count is not None or ffn_layers or ffn_max_nmse is not None
    config = Config(linearize if attention else None, fold if asked else None, _ridge(ridge))
    _check_folder(plan)
    loaded, tokenizer = load_causal(model, dtype, device)
    documents = TextSource(text, split, column).documents()
    batches = token_batches(documents, tokenizer, tokens=tokens, length=length, batch=batch)
    made = run(loaded, batches, config, progress=not quiet)
    made.save(plan)
    if as_json:
        _print_json({"plan": str(plan), "digest": made.digest, **made.header()})
    else:
        console.print(str(made), highlight=False, markup=False)
        console.print(f"written to {plan}")


@app.command(name="plan")
def plan_for_budget(
    model: Model,
    plan: PlanFile,
    text: Text = "python-docs",
    column: Column = "text",
    split: Split = "train",
    tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = 32_768,
    max_loss: Annotated[str | None, typer.Option(help="Most loss of perplexity, as 2%.")] = None,
    speedup: Annotated[float | None, typer.Option(help="Speed-up to reach, as 1.5.")] = None,
    context: Annotated[int, typer.Option(help="Tokens in the cache, or in the prompt.")] = 2048,
    batch: Annotated[int, typer.Option(help="Sequences a step.")] = 1,
    phase: Annotated[str, typer.Option(help="decode or prefill.")] = "decode",
    plot: Annotated[Path | None, typer.Option(help="Also draw the front, as front.svg.")] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Find the fastest plan within a loss, or the best of a speed, and write it."""
    from nbl_compiler.models import load_causal
    from nbl_compiler.planning.budget import Budget
    from nbl_compiler.planning.plan_for_budget import plan as run
    from nbl_compiler.text import TextSource, token_batches

    budget = Budget(_share(max_loss), speedup, context, batch, phase)  # type: ignore[arg-type]
    _check_folder(plan)
    if plot is not None:
        _check_folder(plot)
    loaded, tokenizer = load_causal(model, dtype, device)
    documents = TextSource(text, split, column).documents()
    front = run(
        loaded, token_batches(documents, tokenizer, tokens=tokens), budget, progress=not quiet
    )
    front.plan.save(plan)
    if plot is not None:
        front.save_plot(plot)
    if as_json:
        _print_json({"plan": str(plan), **front.as_json()})
    else:
        console.print(front.table(), highlight=False, markup=False)
        console.print(f"written to {plan}")


@app.command()
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
        _print_json(report.as_json())
    else:
        for part in report.tables(console.width):
            console.print(part, highlight=False, markup=False)
        if html is not None:
            console.print(f"written to {html}")


@app.command(name="eval")
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

    lengths = _numbers(length)
    loaded, tokenizer = load_causal(model, dtype, device)
    found = evaluate_plan(
        loaded, tokenizer, Plan.load(plan), TextSource(text, split, column).documents(),
        tokens=tokens, lengths=lengths, drop=drop, prompts=prompts, new_tokens=new_tokens,
        tasks=[name for name in tasks.split(",") if name], task_folder=task_folder,
        task_limit=task_limit, lowering=lowering, progress=not quiet,
    )  # fmt: skip
    if as_json:
        _print_json(found.as_json())
    else:
        for table in found.tables():
            console.print(table, highlight=False, markup=False)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    plan: Annotated[Path | None, typer.Option(help="Plan; without it the dense model.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens to add, at most.")] = 32,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    lowering: Lowering = "inductor",
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
    options: dict[str, Any] = {"lowering": lowering, "plan": Plan.load(plan) if plan else Plan()}
    forward = torch.compile(loaded, backend="nbl", options=options)
    kv = (
        cache(loaded, options["plan"], length)
        if plan
        else StaticCache(config=loaded.config, max_cache_len=length)
    )
    made = greedy(forward, ids, kv, new_tokens, tokenizer.eos_token_id)
    text = tokenizer.decode(torch.cat([ids, made], 1)[0], skip_special_tokens=True)
    if as_json:
        _print_json({"text": text, "new_tokens": made.shape[1]})
    else:
        console.print(text, markup=False)


@app.command()
def bench(
    model: Model,
    plan: PlanFile,
    prefill: Annotated[str, typer.Option(help="Prompt lengths.")] = "512",
    decode: Annotated[str, typer.Option(help="Context lengths.")] = "512,2048",
    dtype: Dtype = "float32",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Time prefill and decode against dense Inductor, same run, interleaved."""
    from nbl_compiler import speed
    from nbl_compiler.cost import measure_machine
    from nbl_compiler.models import hidden_size, load_causal
    from nbl_compiler.plans import Plan
    from nbl_compiler.speed_table import as_rows, speed_table

    loaded, _ = load_causal(model, dtype, device)
    machine, size = measure_machine(width=hidden_size(loaded)), loaded.config.vocab_size
    with speed.measuring():
        pair = speed.contenders(loaded, Plan.load(plan))
        rows = [speed.prefill(pair, size, n, machine) for n in _numbers(prefill)]
        rows += [speed.decode(pair, size, n, machine) for n in _numbers(decode)]
        seconds = [c.compile_seconds for c in pair]
    if as_json:
        _print_json({"rows": as_rows(rows), "compile_seconds": seconds})
    else:
        console.print(speed_table(rows))
        console.print(f"compile seconds: dense {seconds[0]:.1f}, nbl {seconds[1]:.1f}")


@app.command()
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
        _print_json(result.as_json())
    else:
        console.print(str(result.plan), highlight=False, markup=False)
        console.print(show.table(result))
        console.print(show.notes(result), highlight=False, markup=False)


@app.command()
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
        _print_json([result.as_json() for result in results])
    else:
        for result in results:
            console.print(str(result), highlight=False, markup=False, soft_wrap=True)


def _check_folder(file: Path) -> None:
    """Raise before the work starts, rather than when its result cannot be written."""
    from nbl_compiler.errors import ConfigError

    if not file.parent.is_dir():
        raise ConfigError(f"the folder {file.parent} does not exist")


def _share(text: str | None) -> float | None:
    """Return a share given as ``2%`` or ``0.02``."""
    from nbl_compiler.errors import ConfigError

    if text is None:
        return None
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise ConfigError(f"{text!r} is no share: give 2% or 0.02") from None


def _layers(text: str | None) -> tuple[int | str, ...] | None:
    return tuple(_layer(item) for item in text.split(",")) if text else None


def _layer(item: str) -> int | str:
    text = item.strip()
    return int(text) if text.lstrip("-").isdigit() else text


def _ridge(text: str) -> Any:
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"--ridge {text!r} is neither 'auto' nor a number") from None


def _numbers(text: str) -> list[int]:
    try:
        return [int(item) for item in text.split(",") if item.strip()]
    except ValueError:
        raise ConfigError(f"{text!r} is no list of numbers such as 512,2048") from None


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, default=str))


def main() -> None:
    """Run the command line; a user's mistake ends in one line on stderr and status 1."""
    try:
        app()
    except (NBLError, FileNotFoundError) as error:
        sys.stderr.write(f"nbl: {error}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
