"""``guard="predicted"``: a predictor picks each token's outliers, up to a fixed capacity.

The neurons with the largest predicted |h − ĥ|·‖W2[:, i]‖ are put right; a neuron that the predictor
overlooks passes silently, so the error on held-out text is what counts. Which neurons are left to
the fit depends on the fit, so slopes and choice are refined in turns (``lowering.guarded_fit``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from nbl_compiler.config import FFN, Ridge
from nbl_compiler.ffn.guarded import (
    blank,
    errors_of,
    guard_details,
    make_predictor,
    others,
    plan_tensors,
    rounded_capacity,
)
from nbl_compiler.ffn.sites import FFNFit, FFNSite
from nbl_compiler.ffn.stages import ErrorStage, NeuronStage, SlopeStage, Stage, TargetStage
from nbl_compiler.lowering.guarded_fit import TURNS, fold_slopes, with_slopes
from nbl_compiler.lowering.guarded_site import GuardedFFN
from nbl_compiler.solvers.ffn_regression import MIN_HOLDOUT_TOKENS, fit_affine_map
from nbl_compiler.solvers.folding import FFNWeights

DEFAULT_CAPACITY = 0.05
_EVERY_NEURON = -1.0  # a threshold that flags all: the capacity alone decides

SLOPE_TOKENS = 4096
"""Tokens that slopes are fitted on, three numbers a neuron: the map is fitted on all."""
ERROR_TOKENS = 8192
"""Tokens that the errors of the result are measured on, those that are held out among them."""


class RunPass(Protocol):
    """Runs the model over the text once more."""

    def __call__(self, stages: Mapping[str, Stage], tokens: int | None = None) -> None:
        """Add up what the stages want, of the first ``tokens`` tokens or of all."""


@dataclass
class _Fitting:
    """One site between two passes."""

    site: FFNSite
    kept: Tensor
    kept_weights: FFNWeights
    guarded: GuardedFFN


def fit_predicted(
    sites: Mapping[str, FFNSite],
    kept: Mapping[str, Tensor],
    first: Mapping[str, NeuronStage],
    options: FFN,
    ridge: Ridge,
    run_pass: RunPass,
) -> list[FFNFit]:
    """Fit every site; runs ``TURNS + 3`` passes over the text."""
    states = {
        name: _start(site, kept[name], first[name], options)
        for name, site in sites.items()
        if kept[name].numel() < site.weights.neurons
    }
    for turn in range(TURNS + 1):
        slopes = {n: SlopeStage(s.guarded, everything=turn == 0) for n, s in states.items()}
        run_pass(slopes, SLOPE_TOKENS)
        for name, state in states.items():
            state.guarded = with_slopes(state.guarded, slopes[name].slopes())
    targets = {n: TargetStage(s.guarded, s.kept_weights, n) for n, s in states.items()}
    run_pass(targets)
    for name, state in states.items():
        state.guarded = _fit_map(state.guarded, targets[name], ridge)
    errors = {n: ErrorStage(s.guarded, s.kept_weights) for n, s in states.items()}
    run_pass(errors, ERROR_TOKENS)
    return [_finish(state, errors[name]) for name, state in states.items()]


def _start(site: FFNSite, kept: Tensor, first: NeuronStage, options: FFN) -> _Fitting:
    weights = site.weights
    folded = replace(weights.select(others(weights.neurons, kept)), b2=weights.b2)
    kind = options.predictor_kind
    share = DEFAULT_CAPACITY if options.capacity is None else options.capacity
    moments = first.moments
    predictor = make_predictor(
        kind, folded, options, moments.input_mean, moments.input_covariance, certified=False
    )
    guarded = blank(
        folded,
        predictor=predictor,
        predictor_kind=kind,
        capacity=rounded_capacity(share * folded.neurons, folded.neurons),
        overflow="truncate",
        threshold=_EVERY_NEURON,
        values=options.values,
    )
    return _Fitting(site, kept, weights.select(kept), guarded)


def _fit_map(guarded: GuardedFFN, targets: TargetStage, ridge: Ridge) -> GuardedFFN:
    known = targets.holdout.count >= MIN_HOLDOUT_TOKENS
    fit = fit_affine_map(
        targets.train,
        targets.holdout if known else None,
        ridge=ridge,
        prior=fold_slopes(guarded)[0],
    )
    return replace(guarded, folded=fit.weight.float(), folded_bias=fit.bias.float())


def _finish(state: _Fitting, error: ErrorStage) -> FFNFit:
    return FFNFit(
        state.site.name,
        *errors_of(error),
        tensors=plan_tensors(state.guarded, state.kept),
        details=guard_details(state.site, state.kept, state.guarded, error),
    )
