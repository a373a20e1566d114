"""What one pass over the text adds up at one FFN site.

Every stage is a commutative monoid over tokens: it does not depend on how the stream was cut, and
``merge_across_processes`` sums it over a ``torch.distributed`` job.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nbl_compiler.errors import CalibrationError
from nbl_compiler.ffn.reduce import merged_histogram, merged_moments
from nbl_compiler.ffn.sites import FFNRows, FFNSite
from nbl_compiler.lowering.guarded_ffn import (
    choose,
    correction,
    put_right,
    reference,
    true_outliers,
    true_preactivations,
    unpredicted,
)
from nbl_compiler.lowering.guarded_fit import SlopeMoments, Slopes
from nbl_compiler.lowering.guarded_site import GuardedFFN, hidden_values
from nbl_compiler.several_processes import all_sum
from nbl_compiler.solvers.ffn_moments import FFNMoments, KeptMoments, RegressionMoments
from nbl_compiler.solvers.folding import FFNWeights, dense_ffn
from nbl_compiler.solvers.ranges import RangeHistogram


class Stage(Protocol):
    """Receives a site's tokens during one pass."""

    def add(self, rows: FFNRows, *, held: bool) -> None:
        """Add training tokens, or held-out ones."""

    def merge_across_processes(self) -> None:
        """Add what the other processes of the job saw."""


class NeuronStage:
    """First pass: which neurons are linear in x.

    Moments of (x, hidden product) for the fits per neuron; Σ‖y‖² (``energy``); and, if ranges are
    wanted, a histogram of each neuron's pre-activation.
    """

    def __init__(self, site: FFNSite, *, ranges: bool) -> None:
        f, d = site.weights.w1.shape
        self._weights = site.weights
        self.moments = FFNMoments(d, f, name=site.name)
        self.histogram = RangeHistogram(f, name=site.name) if ranges else None
        self.energy = torch.zeros(1, dtype=torch.float64)

    def add(self, rows: FFNRows, *, held: bool) -> None:
        if held:
            return
        self.moments.observe(rows.x, rows.hidden)
        self.energy += rows.output.double().square().sum().cpu()
        if not bool(self.energy.isfinite()):  # nothing else of an exact guard's passes looks at y
            raise CalibrationError(
                f"{self.moments.name}: NaN or infinite outputs during calibration; run the model "
                "in a wider dtype (float32 or bfloat16) or drop the text that causes it"
            )
        if self.histogram is not None:
            weights = self._weights
            self.histogram.observe(F.linear(rows.x, weights.w1, weights.b1))

    def merge_across_processes(self) -> None:
        self.moments = merged_moments(self.moments)
        all_sum(self.energy)
        if self.histogram is not None:
            self.histogram = merged_histogram(self.histogram)


class OutputStage:
    """Second pass of ``keep+fold``: moments of ((x, kept neurons), y), training and held out."""

    def __init__(self, site: FFNSite, kept: Tensor) -> None:
        d, o = site.weights.w1.shape[1], site.weights.w2.shape[0]
        self.train = KeptMoments(d, kept, o, name=site.name)
        self.holdout = KeptMoments(d, kept, o, name=site.name)

    def add(self, rows: FFNRows, *, held: bool) -> None:
        moments = self.holdout if held else self.train
        moments.observe_ffn(rows.x, rows.hidden, rows.output)

    def merge_across_processes(self) -> None:
        self.train, self.holdout = merged_moments(self.train), merged_moments(self.holdout)


class SlopeStage:
    """One turn of a predicted guard: moments of the neurons where the guard leaves them folded."""

    def __init__(self, guarded: GuardedFFN, *, everything: bool) -> None:
        self._guarded, self._everything = guarded, everything
        gated = guarded.gate is not None
        self.moments = SlopeMoments(guarded.neurons, gated, guarded.up.device)

    def slopes(self) -> Slopes:
        """The fit over the tokens seen; neurons that were hardly ever folded keep their slopes."""
        site = self._guarded
        gate = None if site.gate_slope is None else site.gate_slope.double()
        former = Slopes(gate, site.up_slope.double(), site.intercept.double())
        return self.moments.slopes(former)

    def add(self, rows: FFNRows, *, held: bool) -> None:
        if held:
            return
        site, x = self._guarded, _wide(rows.x)
        gate, up = true_preactivations(site, x)
        folded = torch.ones_like(up, dtype=torch.bool) if self._everything else ~choose(site, x)[1]
        self.moments.observe(gate, up, hidden_values(site, gate, up), folded)

    def merge_across_processes(self) -> None:
        moments = self.moments
        all_sum(moments.count, moments.sums, moments.products)


class TargetStage:
    """Last fit of a predicted guard: moments of (x, what C x + B should be)."""

    def __init__(self, guarded: GuardedFFN, kept: FFNWeights, name: str) -> None:
        self._guarded, self._kept = guarded, kept
        d, o = guarded.up.shape[1], guarded.down.shape[1]
        self.train = RegressionMoments(d, o, name=name)
        self.holdout = RegressionMoments(d, o, name=name)

    def add(self, rows: FFNRows, *, held: bool) -> None:
        site, x = self._guarded, _wide(rows.x)
        target = rows.output.to(x.dtype) - correction(site, x, choose(site, x)[1])
        if self._kept.neurons:
            target = target - dense_ffn(_like(self._kept, x), x)
        (self.holdout if held else self.train).observe(x, target)

    def merge_across_processes(self) -> None:
        self.train, self.holdout = merged_moments(self.train), merged_moments(self.holdout)


class ErrorStage:
    """Final pass of a guarded form: its error, and what the guard does.

    ``errors`` and ``totals`` hold Σ‖ŷ − y‖² and (Σ‖y‖², Σy, n), for training and held-out tokens;
    ``outliers`` counts tokens by their number of flagged neurons.
    """

    def __init__(self, guarded: GuardedFFN, kept: FFNWeights) -> None:
        self._guarded, self._kept = guarded, kept
        o = guarded.down.shape[1]
        self.errors = torch.zeros(2, dtype=torch.float64)
        self.squares = torch.zeros(2, dtype=torch.float64)
        self.sums = torch.zeros(2, o, dtype=torch.float64)
        self.tokens = torch.zeros(2, dtype=torch.float64)
        self.outliers = torch.zeros(guarded.neurons + 1, dtype=torch.float64)
        self._recall = RecallStage(guarded) if guarded.predictor_kind != "none" else None

    def add(self, rows: FFNRows, *, held: bool) -> None:
        x, side = _wide(rows.x), int(held)
        made = reference(self._guarded, x)
        output = made.output
        if self._kept.neurons:
            output = output + dense_ffn(_like(self._kept, x), x)
        y = rows.output.double()
        self.errors[side] += (output.double() - y).square().sum().cpu()
        self.squares[side] += y.square().sum().cpu()
        self.sums[side] += y.sum(0).cpu()
        self.tokens[side] += y.shape[0]
        counts = torch.bincount(made.outliers.long(), minlength=self.outliers.numel())
        self.outliers += counts.double().cpu()
        if self._recall is not None:
            self._recall.add(rows, held=held)

    def merge_across_processes(self) -> None:
        all_sum(self.errors, self.squares, self.sums, self.tokens, self.outliers)
        if self._recall is not None:
            self._recall.merge_across_processes()

    def nmse(self, *, held: bool) -> float:
        """E‖ŷ − y‖² / E‖y − E y‖²; NaN without tokens."""
        side = int(held)
        n = float(self.tokens[side])
        if n == 0:
            return float("nan")
        total = float(self.squares[side] - self.sums[side].square().sum() / n)
        error = float(self.errors[side])
        if total > 0:
            return error / total
        return 0.0 if error == 0 else float("inf")

    @property
    def recall(self) -> float:
        """Share of the true outliers that the guard corrects; 1 without a predictor."""
        return 1.0 if self._recall is None else self._recall.recall

    def needed_capacity(self, share: float) -> int:
        """The least number of outliers that ``share`` of the tokens do not exceed."""
        reached = self.outliers.cumsum(0) >= share * self.outliers.sum()
        return int(reached.double().argmax())


class RecallStage:
    """How many of the outliers by the true pre-activations a guard puts right."""

    def __init__(self, guarded: GuardedFFN) -> None:
        self._guarded = guarded
        self._truth = unpredicted(guarded)
        self.found = torch.zeros(1, dtype=torch.float64)
        self.true = torch.zeros(1, dtype=torch.float64)

    def add(self, rows: FFNRows, *, held: bool) -> None:
        x = _wide(rows.x)
        wanted = true_outliers(self._truth, x)
        self.found += (put_right(self._guarded, x) & wanted).sum().cpu()
        self.true += wanted.sum().cpu()

    def merge_across_processes(self) -> None:
        all_sum(self.found, self.true)

    @property
    def recall(self) -> float:
        """Share of the true outliers that are corrected; 1 if there are none."""
        return float(self.found / self.true) if float(self.true) else 1.0


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _like(weights: FFNWeights, x: Tensor) -> FFNWeights:
    """The weights in the dtype of ``x``."""
    changed: dict[str, Any] = {
        f.name: value.to(x.dtype)
        for f in fields(weights)
        if isinstance(value := getattr(weights, f.name), Tensor)
    }
    return replace(weights, **changed)
