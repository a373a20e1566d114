"""Speed of a plan against dense Inductor: prefill and decode, same process, interleaved.

Predictions stand beside measurements: the roofline of both graphs (``nbl_compiler.cost``) on rates
that are measured in the same rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

from nbl_compiler.cost import Machine
from nbl_compiler.graph_report import GraphReport
from nbl_compiler.kv_cache import cache, cache_bytes
from nbl_compiler.machine import Rates
from nbl_compiler.plans import Plan
from nbl_compiler.timing import Timing, interleaved


@dataclass
class Contender:
    """One compiled form of the model.

    Args:
        name: ``"dense"`` or ``"nbl"``.
        forward: The compiled model.
        make_cache: Builds an empty static cache of a length.
        reports: What the backend reported for each graph it compiled (nbl only).
        compile_seconds: What the calls that compiled took longer than the next ones, summed.
    """

    name: str
    forward: Callable[..., Any]
    make_cache: Callable[[int], Any]
    reports: list[GraphReport] = field(default_factory=list)
    compile_seconds: float = 0.0

    def first_calls(self, call: Callable[[], object]) -> None:
        """Make the call that compiles, and one more; book what the former took longer.

        Args:
            call: What will be timed.
        """
        seconds = []
        for _ in range(2):
            started = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - started)
        self.compile_seconds += max(seconds[0] - seconds[1], 0.0)


@dataclass(frozen=True)
class SpeedRow:
    """One measured point.

    Args:
        what: ``"prefill"`` or ``"decode"``.
        context: Tokens in the prompt, or in the cache.
        dense, nbl: Seconds of one prefill or one decoded token.
        predicted: Speed-up that the rooflines of the two graphs predict.
        kv_bytes: Bytes of the KV caches, (dense, nbl); (0, 0) for prefill.
    """

    what: str
    context: int
    dense: Timing
    nbl: Timing
    predicted: float
    kv_bytes: tuple[int, int] = (0, 0)

    @property
    def speedup(self) -> float:
        """Dense seconds over nbl seconds, medians."""
        return self.dense.median / self.nbl.median


def contenders(model: Any, plan: Plan, **options: Any) -> tuple[Contender, Contender]:
    """Return (dense Inductor, nbl) for one decoder; nothing is compiled yet."""
    from transformers import StaticCache

    reports: list[GraphReport] = []
    dense = Contender(
        "dense",
        torch.compile(model, backend="inductor"),
        lambda length: StaticCache(config=model.config, max_cache_len=length),
    )
    settings = {"plan": plan, "report": reports.append, **options}
    fast = torch.compile(model, backend="nbl", options=settings)
    nbl = Contender("nbl", fast, lambda length: cache(model, plan, length, "static"), reports)
    return dense, nbl


@contextmanager
def measuring() -> Iterator[None]:
    """No gradients, nothing compiled before, and no compiled code from the disk.

    Every point then starts from a fresh Dynamo: shapes are compiled as constants, as for a service
    that runs one shape. Only the lengths that sliding-window layers count in Python are symbolic,
    from the first step on; Dynamo would find that out by compiling every graph twice.
    """
    from torch._inductor.utils import fresh_cache

    with (
        torch.no_grad(),
        fresh_cache(),
        torch._dynamo.config.patch(recompile_limit=64),
        torch.compiler.config.patch(dynamic_sources=r".*\.cumulative_length_int"),  # type: ignore[attr-defined]
    ):
        torch._dynamo.reset()
        yield
    torch._dynamo.reset()


def prefill(
    pair: tuple[Contender, Contender],
    vocabulary: int,
    length: int,
    rates: Rates,
    repeats: int = 3,
) -> SpeedRow:
    """Time one prompt of ``length`` tokens, batch 1, logits of the last position only."""
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    device = _device(pair)
    ids = torch.randint(0, vocabulary, (1, length), generator=generator).to(device)
    calls = {}
    for contender in pair:
        calls[contender.name] = prefill_call(contender, ids)
        contender.first_calls(calls[contender.name])
    times, machine = timed_with_rates(calls, rates, repeats)
    return SpeedRow("prefill", length, times["dense"], times["nbl"], _predict(pair[1], machine))


def prefill_call(contender: Contender, ids: Tensor) -> Callable[[], Tensor]:
    """Return a function that runs a prompt and returns the logits of its last position.

    Args:
        contender: The model.
        ids: [B, T].
    """
    return lambda: contender.forward(input_ids=ids, use_cache=False, logits_to_keep=1).logits


def decode(
    pair: tuple[Contender, Contender],
    vocabulary: int,
    context: int,
    rates: Rates,
    repeats: int = 5,
    steps: int = 8,
) -> SpeedRow:
    """Time single-token steps with ``context`` tokens already in a static cache.

    The cache is filled by setting its length: speed does not depend on what it holds.
    """
    torch._dynamo.reset()
    device = _device(pair)
    token = torch.randint(0, vocabulary, (1, 1), generator=torch.Generator().manual_seed(0))
    token = token.to(device)
    calls, sizes = {}, []
    for contender in pair:
        kv = contender.make_cache(context + 2 * steps + 2)
        calls[contender.name] = decode_call(contender, kv, token, context, steps)
        contender.first_calls(calls[contender.name])
        sizes.append(cache_bytes(kv))
    times, machine = timed_with_rates(calls, rates, repeats)
    per_token = {k: Timing(tuple(r / steps for r in t.runs)) for k, t in times.items()}
    predicted = _predict(pair[1], machine)
    return SpeedRow(
        "decode", context, per_token["dense"], per_token["nbl"], predicted, (sizes[0], sizes[1])
    )


def decode_call(
    contender: Contender, kv: Any, token: Tensor, context: int, steps: int
) -> Callable[[], Tensor]:
    """Return a function that decodes single tokens and returns the last one's logits.

    Args:
        contender: The model.
        kv: Its static cache, empty; allocated here.
        token: What every step reads, [B, 1].
        context: Tokens that the cache pretends to hold before the first step.
        steps: How many tokens to decode.
    """

    def run() -> Tensor:
        set_length(kv, context)
        for _ in range(steps):
            made = contender.forward(input_ids=token, past_key_values=kv)
        logits: Tensor = made.logits
        return logits

    set_up(kv, contender.forward, token.shape[0])
    return run


def set_up(kv: Any, model: Any, batch: int) -> None:
    """Allocate the layers of a model's static cache (outside compiled code, as generate does)."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    weight = next(model.parameters())
    kv.early_initialization(
        batch_size=batch, num_heads=heads, head_dim=width, dtype=weight.dtype, device=weight.device
    )


def set_length(kv: Any, length: int) -> None:
    """Pretend that a static cache already holds ``length`` tokens."""
    for layer in kv.layers:
        if getattr(layer, "is_sliding", False):
            layer.cumulative_length_int = length
        layer.cumulative_length.fill_(min(length, layer.max_cache_len - 1))
        if not getattr(layer, "is_sliding", False):
            layer.cumulative_length.fill_(length)


def _device(pair: tuple[Contender, Contender]) -> torch.device:
    return next(pair[0].forward.parameters()).device  # type: ignore[attr-defined,no-any-return]


def timed_with_rates(
    calls: Mapping[str, Callable[[], object]], rates: Rates, repeats: int
) -> tuple[dict[str, Timing], Machine]:
    """Time calls in turn, and the probes with them; return both.

    Args:
        calls: Name → what to time; compiled and warm.
        rates: Says what to time beside them.
        repeats: Rounds.
    """
    times = interleaved({**calls, **rates.calls}, repeats)
    return times, rates.machine({name: times[name].median for name in rates.calls})


def _predict(contender: Contender, machine: Machine) -> float:
    """Return the predicted speed-up of the last graph that was compiled."""
    report = contender.reports[-1]
    return report.before.seconds(machine) / report.after.seconds(machine)


def parameters_touched(model: Any, plan: Plan) -> tuple[int, int]:
    """Return the parameters that one decoded token reads, (dense, nbl).

    An input embedding that is not also the output matrix is read one row a token.
    """
    tied = {id(p) for p in model.parameters()}
    total = sum(p.numel() for p in model.parameters())
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    if id(embedding) in tied and (head is None or head.weight is not embedding):
        total -= embedding.numel()
    saved = sum(site.details["parameters"] - site.parameters_read for site in plan.rewritten)
    return total, total - saved
