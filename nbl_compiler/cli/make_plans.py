"""``nbl calibrate``, ``nbl plan`` and ``nbl refit``: text in, a plan file out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nbl_compiler.cli.job import job, own_rank, together
from nbl_compiler.cli.shared import (
    Column,
    Device,
    Dtype,
    Json,
    Model,
    PlanFile,
    Quiet,
    Split,
    Text,
    check_folder,
    console,
    layer_names,
    print_json,
    ridge_of,
    share,
)


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
    mixed: Annotated[bool, typer.Option("--mixed", help="Maps read mixed values.")] = False,
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
    device_map: Annotated[
        str | None, typer.Option(help="Spread the model over devices and memory, such as auto.")
    ] = None,
    tensor_parallel: Annotated[
        bool, typer.Option("--tensor-parallel", help="One model over torchrun's processes.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Calibrate a model on text and write the plan.

    Started by torchrun, every process takes its share of the text.
    """
    from nbl_compiler.calibration import calibrate as run
    from nbl_compiler.config import FFN, Attention, Config
    from nbl_compiler.models import Spread, load_causal
    from nbl_compiler.text import TextSource, token_batches

    linearize = Attention(
        count, layer_names(layers), max_nmse, rank_by, input,  # type: ignore[arg-type]
        taps=taps, averages=averages, mixed=mixed,
    )  # fmt: skip
    fold = FFN(
        ffn_count, layer_names(ffn_layers), ffn_max_nmse, keep, guard,  # type: ignore[arg-type]
        capacity, coverage, predictor,  # type: ignore[arg-type]
        values=values, rank_by=ffn_rank_by,  # type: ignore[arg-type]
    )  # fmt: skip
    asked = ffn or ffn_count is not None or ffn_layers or ffn_max_nmse is not None
    config = Config(linearize if attention else None, fold if asked else None, ridge_of(ridge))
    with job(device) as own_device:
        with together():
            if own_rank() == 0:
                check_folder(plan)
            spread = Spread(device_map, tensor_parallel)
            loaded, tokenizer = load_causal(model, dtype, own_device, spread)
            documents = TextSource(text, split, column).documents()
            batches = token_batches(documents, tokenizer, tokens=tokens, length=length, batch=batch)
        made = run(loaded, batches, config, whole_text=True, progress=not quiet)
        if own_rank() > 0:
            return
        made.save(plan)
        if as_json:
            print_json({"plan": str(plan), "digest": made.digest, **made.header()})
        else:
            console.print(str(made), highlight=False, markup=False)
            console.print(f"written to {plan}")


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
    int8: Annotated[
        bool, typer.Option("--int8", help="Weights will be held as torchao's int8.")
    ] = False,
    measure: Annotated[bool, typer.Option("--measure", help="Time every kind of site.")] = False,
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

    budget = Budget(share(max_loss), speedup, context, batch, phase, int8)  # type: ignore[arg-type]
    check_folder(plan)
    if plot is not None:
        check_folder(plot)
    loaded, tokenizer = load_causal(model, dtype, device)
    documents = TextSource(text, split, column).documents()
    batches = token_batches(documents, tokenizer, tokens=tokens)
    front = run(loaded, batches, budget, measure=measure, progress=not quiet)
    front.plan.save(plan)
    if plot is not None:
        front.save_plot(plot)
    if as_json:
        print_json({"plan": str(plan), **front.as_json()})
    else:
        console.print(front.table(), highlight=False, markup=False)
        console.print(f"written to {plan}")


def refit(
    model: Model,
    plan: PlanFile,
    out: Annotated[Path, typer.Argument(help="The new plan file.")],
    text: Text = "python-docs",
    column: Column = "text",
    split: Split = "train",
    tokens: Annotated[int, typer.Option(help="Tokens to fit on.")] = 32_768,
    ridge: Annotated[str, typer.Option(help="auto, or a number of at least 0.")] = "auto",
    folder: Annotated[
        Path | None, typer.Option(help="Keep the state here, to go on after an interruption.")
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Fit a plan's maps anew, each on the stream that those before it leave."""
    from nbl_compiler.models import load_causal
    from nbl_compiler.plans import Plan
    from nbl_compiler.refitting.refit_plan import refit as run
    from nbl_compiler.text import TextSource, token_batches

    check_folder(out)
    former = Plan.load(plan)
    loaded, tokenizer = load_causal(model, dtype, device)
    documents = TextSource(text, split, column).documents()
    batches = token_batches(documents, tokenizer, tokens=tokens)
    made = run(loaded, former, batches, ridge=ridge_of(ridge), folder=folder, progress=not quiet)
    made.save(out)
    facts = made.config["refit"]
    if as_json:
        print_json({"plan": str(out), "digest": made.digest, **facts})
    else:
        console.print(
            f"loss on text held back: {facts['loss_before']:.4f} → {facts['loss_after']:.4f}"
        )
        console.print(f"written to {out}")
