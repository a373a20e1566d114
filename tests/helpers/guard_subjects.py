"""Small guarded models, and what their guards do, counted by hand in plain torch and float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from helpers.ffn_surgery import (
    LAYOUTS,
    Layout,
    Weights,
    fold_by_surgery,
    folded_parts,
    read_weights,
)
from helpers.own_ffn import NEURONS, WIDTH, OwnModel, compiled_ffn, folded, own_model, rows, stream
from torch import Tensor

import nbl_compiler as nbl
from nbl_compiler import GuardCounts
from nbl_compiler.lowering.predictors import NORM_SLACK
from nbl_compiler.plans import Site

KEEP = 0.25
FOLDED = NEURONS - round(KEEP * NEURONS)
# Calls of several shapes: a batch, one token, none, a prompt.
SHAPES = ((3, 17), (1, 1), (2, 0), (1, 40))

EXACT: dict[str, dict[str, Any]] = {
    "true": {"capacity": 0.2},
    "8 bits": {"predictor": "quantized_8", "capacity": 0.2},
    "4 bits": {"predictor": "quantized_4", "capacity": 0.4},
    "2 bits": {"predictor": "quantized_2", "capacity": 0.6},
}
PREDICTED: dict[str, dict[str, Any]] = {
    "true": {"predictor": "none"},
    "8 bits": {"predictor": "quantized_8"},
    "4 bits": {},
    "low rank": {"predictor": "low_rank", "rank": 4},
}


@dataclass(frozen=True)
class Subject:
    """A model and a plan that guards all its FFNs."""

    model: OwnModel
    plan: nbl.Plan
    gated: bool

    @property
    def names(self) -> list[str]:
        """The sites."""
        return [site.name for site in self.plan.sites]

    def compile(self, **options: Any) -> Callable[[Tensor], Tensor]:
        """Return the compiled model; it runs without gradients."""
        return torch.no_grad()(compiled_ffn(self.model, self.plan, **options))

    @property
    def layout(self) -> Layout:
        """Of the FFNs."""
        return LAYOUTS["own gated" if self.gated else "own gelu"]

    def folded_weights(self, layer: int) -> Weights:
        """The folded neurons of one FFN, in float64."""
        left = torch.ones(NEURONS, dtype=torch.bool)
        left[self.plan.sites[layer].tensors["kept"]] = False
        return read_weights(self.model.layers[layer], self.layout).select(left)

    def count(self, calls: list[Tensor]) -> dict[str, GuardCounts]:
        """Count by hand what the guards do in these calls."""
        oracle = fold_by_surgery(self.model, self.plan, self.layout).double()
        seen: list[list[Tensor]] = []
        for part in folded_parts(oracle):
            seen.append([torch.zeros(0, WIDTH, dtype=torch.float64)])
            part.register_forward_pre_hook(lambda _, args, own=seen[-1]: own.append(args[0]))
        for x in calls:
            if x.numel():
                oracle(x.double())
        counts = {}
        for layer, (site, own) in enumerate(zip(self.plan.sites, seen, strict=True)):
            flagged = self._flagged(layer, torch.cat([x.reshape(-1, WIDTH) for x in own]))
            dense = flagged > site.details["capacity"]
            counts[site.name] = GuardCounts(
                len(flagged),
                int(flagged.sum()),
                max(flagged.tolist(), default=0),
                int(dense.sum()) if site.details["guard"] == "exact" else 0,
            )
        return counts

    def _flagged(self, layer: int, x: Tensor) -> Tensor:
        """Flagged neurons per token, [tokens]."""
        site = self.plan.sites[layer]
        if site.details["guard"] == "predicted":
            return torch.full((len(x),), FOLDED)
        if site.details["predictor"] == "none":
            z, slack = preactivations(self.folded_weights(layer), x), torch.zeros(())
        else:
            z, slack = predictions(site, x), certificate(site, x)
        low, high = site.tensors["low"].double(), site.tensors["high"].double()
        return ((z - slack < low) | (z + slack > high)).sum(1)


def preactivations(weights: Weights, x: Tensor) -> Tensor:
    """The neurons' pre-activations, of gated ones the gate's first."""
    first = x @ weights.w1.T + weights.b1
    if weights.w_up is None or weights.b_up is None:
        return first
    return torch.cat([first, x @ weights.w_up.T + weights.b_up], dim=1)


def predictions(site: Site, x: Tensor) -> Tensor:
    """The same as the site's predictor says."""
    stored = [site.tensors[f"predictor_{i}"] for i in range(4) if f"predictor_{i}" in site.tensors]
    if site.details["predictor"] == "low_rank":
        basis, coefficients, offset = (tensor.double() for tensor in stored)
        return x @ basis.T @ coefficients.T + offset
    codes, (scale, shift, offset) = stored[0].long(), (tensor.double() for tensor in stored[1:])
    bits = int(site.details["predictor"][-1])
    planes = [(codes >> place) % 2**bits for place in range(0, 8, bits)]
    unpacked = torch.cat(planes, dim=1).double() * scale[:, None] + shift[:, None]
    return x @ unpacked.T + offset


def certificate(site: Site, x: Tensor) -> Tensor:
    """How far its predictions may be off, norms being widened for their own rounding."""
    radius, rounding, centre = (site.tensors[f"predictor_{i}"].double() for i in range(4, 7))
    distance = (x - centre).norm(dim=1, keepdim=True) * NORM_SLACK
    return distance * radius + (x.norm(dim=1, keepdim=True) * NORM_SLACK + 1) * rounding


@cache
def exact(form: str, layers: int = 2) -> Subject:
    model = own_model(*[False] * layers)
    plan = folded(model, [torch.cat(stream())], keep=KEEP, guard="exact", **EXACT[form])
    nbl.attach(model, None)
    return Subject(model, plan, gated=False)


@cache
def predicted(form: str, gated: bool) -> Subject:
    model = own_model(gated, gated)
    batches = [torch.cat(stream())]
    plan = folded(model, batches, keep=KEEP, guard="predicted", capacity=0.3, **PREDICTED[form])
    nbl.attach(model, None)
    return Subject(model, plan, gated)


def fresh(one: Subject) -> Subject:
    """The same with counters that nothing has touched."""
    return Subject(one.model, nbl.Plan(one.plan.sites, one.plan.fingerprint), one.gated)


def calls(*seeds: int) -> list[Tensor]:
    """Inputs of every shape; wider than what calibration saw, so that tokens run dense."""
    return [1.5 * rows(*shape, seed=seed) for seed in seeds for shape in SHAPES]
