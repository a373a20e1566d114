"""The speed axis: prefill and decode at one context, batch and dtype, all contenders in turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import psutil
import torch
from peers.does_not_apply import DoesNotApply
from torch import Tensor

from bench.contenders import Contender, Made
from bench.footprint import held_bytes, peak_allocated
from bench.ratios import exact, of_rounds
from bench.results import Row
from bench.running import for_speed
from bench.subjects import Subject, vocabulary_size
from nbl_compiler import speed
from nbl_compiler.cost import Cost, Machine
from nbl_compiler.errors import NBLError
from nbl_compiler.kv_cache import cache_bytes
from nbl_compiler.machine import Rates
from nbl_compiler.timing import Timing

DENSE = "dense inductor"
"""What everything is compared with."""
STEPS = 8
"""Tokens that one timed run decodes."""
MEMORY_SHARE = 0.8
"""Of the free memory, which the caches of all contenders together may take."""
# Logits are of order one to ten; a wrong graph misses by as much. bfloat16 keeps 8 bits.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.25}
PICKING = 10.0
"""How much more is allowed to contenders that pick neurons: rounding may change a pick."""


class WrongResult(Exception):
    """A compiled contender computes something else than uncompiled: it is not timed."""


@dataclass(frozen=True)
class Point:
    """What is timed.

    Args:
        phase: One prompt, or single tokens behind a filled cache.
        context: Tokens in the prompt, or in the cache.
        batch: Sequences at once.
        fraction: How much contenders replace, but for those that always replace more.
        dtype: Of weights and activations.
        repeats: Rounds.
        only: Who takes part, if not everyone who is timed.
    """

    phase: Literal["prefill", "decode"]
    context: int
    batch: int = 1
    fraction: float = 0.5
    dtype: str = "float32"
    repeats: int = 5
    only: tuple[str, ...] | None = None

    def name(self, model: str, contender: Contender) -> str:
        """Return the row's name."""
        return (
            f"speed/{model}/{self.dtype}/{self.phase}/{self.context}/batch {self.batch}/"
            f"at {self.fraction:g}/{contender.name} {self.fraction_of(contender):g}"
        )

    def fraction_of(self, contender: Contender) -> float:
        """Return how much one contender replaces."""
        return max(self.fraction, contender.least)


@dataclass
class _Ready:
    """A contender that compiled and ran."""

    contender: Contender
    made: Made
    compiled: speed.Contender
    call: Callable[[], Tensor]
    kv_bytes: int
    peak: int


def measure(
    point: Point, subject: Subject, contenders: Sequence[Contender], rates: Rates
) -> dict[str, Row]:
    """Compile every contender, check it against its uncompiled self, and time them in turns.

    The check is made at the first point of a phase and dtype.

    Args:
        point: What to time.
        subject: The model, in the point's dtype.
        contenders: Who; the dense model by Inductor among them.
        rates: Tell the machine's rates in that dtype; probed in turns with the contenders.

    Returns:
        Row name → row; of a contender that cannot take part, one that says why.
    """
    torch._dynamo.reset()
    names = {c.name: point.name(subject.name, c) for c in contenders}
    about = {
        "kind": "speed", "model": subject.name, "dtype": point.dtype, "phase": point.phase,
        "context": point.context, "batch": point.batch, "at": point.fraction,
    }  # fmt: skip
    needed = len(contenders) * cache_estimate(subject.model, point)
    free = int(MEMORY_SHARE * psutil.virtual_memory().available)
    if needed > free:
        reason = f"the caches would take {needed:,} bytes, {free:,} are free for them"
        return {n: {**about, **_who(point, c), "skipped": reason}
                for c, n in zip(contenders, names.values(), strict=True)}  # fmt: skip
    rows: dict[str, Row] = {}
    ready: list[_Ready] = []
    for contender in contenders:
        try:
            ready.append(_prepare(point, subject, contender))
        except (DoesNotApply, WrongResult, NBLError) as reason:
            if contender.name == DENSE:
                raise  # there is nothing to compare with
            rows[names[contender.name]] = {
                **about,
                **_who(point, contender),
                "skipped": str(reason),
            }
    calls = {r.contender.name: r.call for r in ready}
    timings, machine = speed.timed_with_rates(calls, rates, point.repeats)
    dense = next(r for r in ready if r.contender.name == DENSE)
    for one in ready:
        rows[names[one.contender.name]] = {
            **about, **_who(point, one.contender),
            **_figures(point, one, dense, timings, machine),
        }  # fmt: skip
    return {name: rows[name] for name in names.values()}


def cache_estimate(model: Any, point: Point) -> int:
    """Return the bytes of a dense KV cache at a point; none for a prompt alone."""
    if point.phase == "prefill":
        return 0
    config = model.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = torch.finfo(getattr(torch, point.dtype)).bits // 8
    rows = config.num_hidden_layers * config.num_key_value_heads * (point.context + 2 * STEPS)
    return int(2 * rows * head * size * point.batch)


def _who(point: Point, contender: Contender) -> Row:
    return {
        "contender": contender.name,
        "fraction": point.fraction_of(contender),
        "family": contender.family,
        "origin": contender.origin,
    }


def _prepare(point: Point, subject: Subject, contender: Contender) -> _Ready:
    made = contender.made(subject, point.fraction_of(contender))
    compiled, backend = for_speed(contender, made)
    call, kv = _call(point, subject, made, compiled)
    compiled.first_calls(call)
    logits: list[Tensor] = []
    if kv is not None:
        kv.reset()  # value states add up what every call saw
    peak = peak_allocated(lambda: logits.append(call()))
    known = (contender.name, point.phase, point.dtype)
    if contender.compiled and known not in subject.checked:
        if kv is not None:
            kv.reset()
        backend.uncompiled = True
        _check(contender, logits[0], call())
        backend.uncompiled = False
        subject.checked.add(known)
    return _Ready(contender, made, compiled, call, 0 if kv is None else cache_bytes(kv), peak)


def _call(
    point: Point, subject: Subject, made: Made, compiled: speed.Contender
) -> tuple[Callable[[], Tensor], Any]:
    """Return what is timed, and its cache, if it has one."""
    generator = torch.Generator().manual_seed(0)
    length = point.context if point.phase == "prefill" else 1
    size = (point.batch, length)
    ids = torch.randint(0, vocabulary_size(subject.model), size, generator=generator)
    if point.phase == "prefill":
        return speed.prefill_call(compiled, ids), None
    kv = compiled.make_cache(point.context + 2 * STEPS + 2)
    return speed.decode_call(compiled, kv, ids, point.context, STEPS), kv


def _check(contender: Contender, made: Tensor, expected: Tensor) -> None:
    """Refuse to time what does not compute what it should.

    Raises:
        WrongResult: saying by how much.
    """
    allowed = TOLERANCE[expected.dtype] * max(float(expected.abs().max()), 1.0)
    allowed *= PICKING if contender.picks else 1.0
    found = float((made - expected).abs().max())
    if not found <= allowed:
        raise WrongResult(
            f"compiled logits differ by {found:.2e} from uncompiled ones, {allowed:.2e} is "
            "rounding; not timed"
        )


def _figures(
    point: Point,
    one: _Ready,
    dense: _Ready,
    timings: dict[str, Timing],
    machine: Machine,
) -> Row:
    """Return everything measured of one contender."""
    prefill = point.phase == "prefill"
    calls = 1 if prefill else STEPS
    tokens = point.batch * (point.context if prefill else 1)
    runs = [seconds / calls for seconds in timings[one.contender.name].runs]
    timing = Timing(tuple(runs))
    own, base = (_cost(r, dense) for r in (one, dense))
    predicted = own.seconds(machine)
    held, dense_held = (_held(r) for r in (one, dense))
    dense_runs = [seconds / calls for seconds in timings[DENSE].runs]
    faster = of_rounds(dense_runs, runs)
    promised = base.seconds(machine) / predicted
    ratios = {
        "speed-up": faster,
        "resident bytes": exact(held / dense_held, "lower"),
        "bytes moved": exact(own.bytes / base.bytes, "lower"),
    }
    if dense.kv_bytes:
        ratios["KV bytes"] = exact(one.kv_bytes / dense.kv_bytes, "lower")
    return {
        "seconds": runs,
        "median_seconds": timing.median,
        "spread": timing.spread,
        "tokens_per_second": tokens / timing.median,
        "ms_per_token": 1e3 * timing.median / tokens,
        "compile_seconds": one.compiled.compile_seconds,
        "calibration_seconds": one.made.calibration_seconds,
        "resident_bytes": held,
        "kv_bytes": one.kv_bytes,
        "peak_bytes": held + one.kv_bytes + one.peak,
        "bytes_per_token": own.bytes / tokens,
        "flops_per_token": own.flops / tokens,
        "predicted_seconds": predicted,
        "reached": predicted / timing.median,
        "predicted_speedup": promised,
        "speedup_reached": float(faster["value"]) / promised,
        "rates": vars(machine),
        "ratios": ratios,
    }


def _cost(one: _Ready, dense: _Ready) -> Cost:
    """Return what the graph that ran does; an eager model does what the dense graph does."""
    reports = one.compiled.reports or dense.compiled.reports
    return reports[-1].after


def _held(one: _Ready) -> int:
    return held_bytes(one.made, input_ids=torch.ones(1, 4, dtype=torch.long), use_cache=False)
