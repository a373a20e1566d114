"""Small models to monitor, and what a monitor should find, from hooks and plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch._dynamo
from helpers.ffn_calibrating import dense_inputs
from helpers.ffn_surgery import LAYOUTS, fold_by_surgery, folded_parts
from helpers.own_ffn import WIDTH, OwnModel, folded, own_model, rows, stream
from torch import Tensor

import nbl_compiler as nbl

# Sums of float32 z of order one, against float64.
TOLERANCE = 1e-5
LONG = ((8, 64), (1, 1), (2, 0), (3, 17))


@contextmanager
def compilations() -> Iterator[list[int]]:
    """Count the graphs that Dynamo compiles."""
    counts = [0]
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    yield counts
    counts[0] = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before


@cache
def _plan() -> tuple[OwnModel, nbl.Plan]:
    model = own_model(True, True)
    plan = folded(model, keep=0.25, holdout=0.0)
    nbl.attach(model, None)
    return model, plan


def subject() -> tuple[OwnModel, nbl.Plan]:
    """A model of two gated FFNs and a plan that folds both; nothing is compiled."""
    model, plan = _plan()
    return model, nbl.Plan(plan.sites, plan.fingerprint)


def run(fast: Callable[..., Any], *batches: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [fast(x) for x in batches]


def quiet(compiled_model: object, **options: Any) -> nbl.Monitor:
    return nbl.monitor(compiled_model, warn=False, **options)


def traffic(seed: int = 9) -> list[Tensor]:
    return [rows(*shape, seed=seed) for shape in LONG]


def by_hand(model: OwnModel, plan: nbl.Plan, batches: list[Tensor]) -> list[tuple[float, float]]:
    """Return (shift, energy) a site, from hooks on the plan applied by surgery, in float64."""
    calibrated_on = dense_inputs(model, torch.cat(stream()))
    oracle = fold_by_surgery(model, plan, LAYOUTS["own gated"]).double()
    seen: list[list[Tensor]] = []
    for part in folded_parts(oracle):
        seen.append([])
        part.register_forward_pre_hook(lambda _, args, own=seen[-1]: own.append(args[0]))
    for x in batches:
        if x.numel():
            oracle(x.double())
    made = []
    for own, before in zip(seen, calibrated_on, strict=True):
        x = torch.cat([x.reshape(-1, WIDTH) for x in own])
        z = (x - before.mean(0)) / before.std(0, correction=0)
        made.append((float(z.mean(0).square().mean().sqrt()), float(z.square().mean())))
    return made
