"""What a plan gains in decoding, alone and on int8 weights, and what it loses.

    python benchmarks/plan_speed.py plan.safetensors --eval-text held_out.txt --decode 512,4096

Interleaved in one run: the dense model compiled by Inductor; this backend with a plan that changes
nothing, which still streams the products of few tokens; the plan; and the plan on a model whose
linear layers torchao quantized to int8 (but for FFNs that the plan guards, which gather rows of
float weights). Perplexity is on text that planning never saw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from decoder_texts import Subject, arguments, load
from peers.int8 import int8
from rich.console import Console
from rich.table import Table
from transformers import StaticCache

import nbl_compiler as nbl
from nbl_compiler import speed
from nbl_compiler.evaluation.perplexity import perplexity_of
from nbl_compiler.kv_cache import cache
from nbl_compiler.machine import Probe, Rates
from nbl_compiler.models import hidden_size
from nbl_compiler.plans import Plan

STEPS = 8
"""Tokens that one timed run decodes."""
DENSE = "dense, Inductor"


@dataclass(frozen=True)
class Form:
    """One way to run the model.

    Args:
        name: In the table.
        model: What runs.
        plan: What it is compiled with by this backend; None for Inductor alone.
    """

    name: str
    model: Any
    plan: Plan | None


def forms(model: Any, plan: Plan, *, alone: bool = True) -> list[Form]:
    """Return what is compared.

    Args:
        model: The dense model.
        plan: Its plan.
        alone: Also the plan on float weights, and an empty one.
    """
    guarded = [site.name for site in plan.rewritten if site.details.get("form") == "guarded"]
    quantized = Form("plan on int8 weights", int8(model, leave=guarded), plan)
    others = [Form("empty plan", model, Plan()), Form("plan", model, plan)] if alone else []
    return [Form(DENSE, model, None), *others, quantized]


def losses(subject: Subject, compared: Sequence[Form]) -> dict[str, float]:
    """Return each form's perplexity."""
    dense = subject.perplexity(Plan())
    found = {}
    for form in compared:
        plan = form.plan or Plan()
        same = form.model is subject.model and not plan.rewritten
        found[form.name] = dense if same else _perplexity(subject, form.model, plan)
    return found


def _perplexity(subject: Subject, model: Any, plan: Plan) -> float:
    tokens = subject.args.eval_tokens
    return perplexity_of(model, subject.tokenizer, plan, subject.documents, tokens)


def decode(
    compared: Sequence[Form], context: int, rates: Rates, repeats: int
) -> tuple[dict[str, float], dict[str, float], float]:
    """Return the seconds of a decoded token, measured and predicted, and the widest spread.

    Args:
        compared: The dense model's first.
        context: Tokens in the cache.
        rates: Probed in turns with the forms.
        repeats: Rounds.
    """
    torch._dynamo.reset()
    ready = {form.name: _compiled(form) for form in compared}
    token = torch.ones(1, 1, dtype=torch.long)
    calls: dict[str, Callable[[], object]] = {}
    for name, contender in ready.items():
        kv = contender.make_cache(context + 2 * STEPS + 2)
        calls[name] = speed.decode_call(contender, kv, token, context, STEPS)
        contender.first_calls(calls[name], count=2)
    timings, machine = speed.timed_with_rates(calls, rates, repeats)
    costs = {name: one.reports[-1].after for name, one in ready.items() if one.reports}
    costs[DENSE] = next(one for one in ready.values() if one.reports).reports[-1].before
    return (
        {name: timings[name].median / STEPS for name in ready},
        {name: costs[name].seconds(machine) for name in ready},
        max(timings[name].spread for name in ready),
    )


def _compiled(form: Form) -> speed.Contender:
    if form.plan is None:
        return speed.Contender(
            form.name,
            torch.compile(form.model, backend="inductor"),
            lambda length: StaticCache(config=form.model.config, max_cache_len=length),
        )
    plan, reports = form.plan, list[Any]()
    return speed.Contender(
        form.name,
        torch.compile(form.model, backend="nbl", options={"plan": plan, "report": reports.append}),
        lambda length: cache(form.model, plan, length, "static"),
        reports,
    )


def report(
    subject: Subject, plan: Plan, contexts: Sequence[int], repeats: int, *, alone: bool = True
) -> None:
    """Print a table of all forms for each context, as soon as it is measured.

    Args:
        subject: The model and its texts.
        plan: Its plan.
        contexts: Tokens in the cache.
        repeats: Rounds.
        alone: As for ``forms``.
    """
    compared = forms(subject.model, plan, alone=alone)
    perplexities = losses(subject, compared)
    dense = perplexities[DENSE]
    with speed.measuring():
        rates = Probe(hidden_size(subject.model), codes=True)
        for context in contexts:
            seconds, predicted, spread = decode(compared, context, rates, repeats)
            table = Table("form", "ms", "speed-up", "predicted", "perplexity", "/ dense")
            table.title = f"decode, {context:,} tokens of context; widest spread {spread:.0%}"
            for name, taken in seconds.items():
                table.add_row(
                    name, f"{1e3 * taken:.1f}", f"{seconds[DENSE] / taken:.2f}×",
                    f"{predicted[DENSE] / predicted[name]:.2f}×",
                    f"{perplexities[name]:.2f}", f"{perplexities[name] / dense:.3f}×",
                )  # fmt: skip
            Console().print(table)


def main() -> None:
    """Parse the command line, measure, print."""
    parser = arguments(__doc__, tokens=0, eval_tokens=8_192)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--decode", default="512,4096", help="contexts to measure at")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    subject = load(args)
    contexts = [int(n) for n in args.decode.split(",")]
    report(subject, nbl.Plan.load(args.plan), contexts, args.repeats)


if __name__ == "__main__":
    main()
