"""How cost grows: calibration against tokens and hidden size, compilation against layers."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from calibration_cost import build as build_width
from peers.stored_statistics import layer_statistics, stored_statistics

from bench.contenders import CONTENDERS
from bench.footprint import peak_allocated
from bench.ratios import Ratio, of_rounds
from bench.results import Row
from bench.shapes import build
from bench.speed_points import DENSE, Point, measure
from bench.subjects import Subject
from nbl_compiler.calibration import observe_model
from nbl_compiler.config import Config
from nbl_compiler.machine import Rates
from nbl_compiler.timing import Timing, interleaved

ROW = 512
"""Tokens a row."""


@dataclass(frozen=True)
class Calibration:
    """One point of calibration's cost.

    Args:
        width: Hidden size; layers have the usual proportions.
        tokens: How many to calibrate on.
        layers: Number of layers.
        rounds: Interleaved runs.
    """

    width: int
    tokens: int
    layers: int = 6
    rounds: int = 3

    @property
    def name(self) -> str:
        """The row's name."""
        return f"growth/calibration/width {self.width}/{self.layers} layers/{self.tokens} tokens"


def calibration(point: Calibration) -> Row:
    """Return seconds and peak memory of attention's statistics, here and the published way.

    ``forward`` is the body of the model alone, uncompiled: what no calibration can do without.
    ``published`` keeps the stream of all tokens from layer to layer. Where that does not fit, the
    model runs once a layer: ``one layer`` is what one of them takes, and all take the same.
    """
    model = build_width(point.width, point.layers)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 4096, (max(point.tokens // ROW, 1), ROW), generator=generator)
    batches = list(ids.split(4))
    held: dict[str, int] = {}

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch, use_cache=False, logits_to_keep=1)

    def here() -> None:
        found = observe_model(model, batches, Config(), progress=False, solve=False)
        sites = found.observation.sites.values()
        held["moments"] = sum(site.train.nbytes + site.holdout.nbytes for site in sites)

    def published() -> None:
        stored_statistics(model, batches)

    def one_layer() -> None:
        layer_statistics(model, batches, point.layers // 2)

    calls: dict[str, Callable[[], object]] = {
        "forward": forward, "here": here, "published": published, "one_layer": one_layer
    }  # fmt: skip
    for name, call in calls.items():  # warm; the observing graph is traced anew in every run
        held[name] = peak_allocated(call)
    timings = interleaved(calls, point.rounds)
    gc.collect()
    beyond = [_beyond(timings[name], timings["forward"]) for name in ("here", "published")]
    every_layer = [point.layers * seconds for seconds in timings["one_layer"].runs]
    return {
        "kind": "growth",
        "what": "calibration",
        "width": point.width,
        "layers": point.layers,
        "tokens": int(ids.numel()),
        **{f"{name}_seconds": timing.runs for name, timing in timings.items()},
        "tokens_per_second": ids.numel() / timings["here"].median,
        "statistics_seconds": {"here": beyond[0], "published": beyond[1]},
        "bytes": held,
        "ratios": {
            "over published way": _over(timings["published"].runs, timings),
            "over a run a layer": _over(every_layer, timings),
        },
    }


def compilation(shape: str, layers: int, context: int, rates: Rates, fraction: float = 0.5) -> Row:
    """Return the compile seconds of one decode step for a number of layers."""
    subject = Subject(shape, build(shape, layers=layers))
    point = Point("decode", context, fraction=fraction, repeats=1)
    who = [CONTENDERS[name] for name in (DENSE, "NBL", "keep+fold")]
    rows = measure(point, subject, who, rates)
    seconds = {row["contender"]: row["compile_seconds"] for row in rows.values()}
    return {
        "kind": "growth", "what": "compilation", "model": shape, "layers": layers,
        "context": context, "fraction": fraction, "compile_seconds": seconds, "ratios": {},
    }  # fmt: skip


def compilation_name(shape: str, layers: int, context: int) -> str:
    """Return the row's name."""
    return f"growth/compilation/{shape}/{layers} layers/{context}"


def _over(seconds: Sequence[float], timings: dict[str, Timing]) -> Ratio:
    return of_rounds(seconds, timings["here"].runs)


def _beyond(timing: Timing, forward: Timing) -> float:
    """Return the median seconds beyond the forward pass of the same round."""
    return statistics.median(a - b for a, b in zip(timing.runs, forward.runs, strict=True))
