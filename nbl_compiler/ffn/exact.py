"""``guard="exact"``: every neuron outside its hot range is put right, and the rest is certified.

TARDIS (arXiv 2501.10054) for plain FFNs. Ranges come from histograms of the pre-activations; how
much each must hold is divided between all sites and neurons under one target. Inside its range a
neuron's affine fit errs by at most e_i, for any z whatever, so

    |y − y_dense|_j  ≤  bound_j = Σ_i |W2[j, i]| e_i      for every input (up to rounding),

also with a certified predictor, whose own rounding error only adds neurons to the outliers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nbl_compiler.config import FFN
from nbl_compiler.ffn.guarded import (
    blank,
    errors_of,
    guard_details,
    make_predictor,
    others,
    plan_tensors,
    rounded_capacity,
)
from nbl_compiler.ffn.predicted import RunPass
from nbl_compiler.ffn.sites import FFNFit, FFNSite
from nbl_compiler.ffn.stages import ErrorStage, NeuronStage
from nbl_compiler.lowering.guarded_site import GuardedFFN
from nbl_compiler.solvers.activation_errors import max_affine_error
from nbl_compiler.solvers.activations import activation
from nbl_compiler.solvers.affine_fit import AffineFit, least_squares_affine
from nbl_compiler.solvers.ffn_bounds import folded_bound
from nbl_compiler.solvers.folding import FFNWeights, fold_affine, kept_count, select_kept
from nbl_compiler.solvers.hot_ranges import (
    COVERAGE_LEVELS,
    CoverageCurves,
    allocate_coverage,
    coverage_curves,
    range_moments,
)

WITHIN_CAPACITY = 0.99
"""Share of the calibration tokens whose outliers the default capacity holds; others run dense."""


@dataclass
class _Fitting:
    """One site between two passes."""

    site: FFNSite
    kept: Tensor
    folded: Tensor
    kept_weights: FFNWeights
    guarded: GuardedFFN
    bound: Tensor


def fit_exact(
    sites: Mapping[str, FFNSite],
    first: Mapping[str, NeuronStage],
    options: FFN,
    run_pass: RunPass,
) -> list[FFNFit]:
    """Fit every plain FFN; refuses gated ones. Runs two passes over the text."""
    plain = {name: site for name, site in sites.items() if not site.weights.gated}
    refused = [
        FFNFit(
            name,
            refusal="guard='exact' needs a plain FFN: the up projection of a gated one has no "
            "bounded range; use guard='predicted'",
            details={"parameters": site.parameters},
        )
        for name, site in sites.items()
        if site.weights.gated
    ]
    if not plain:
        return refused
    states = _start(plain, first, options)
    trial = {n: ErrorStage(s.guarded, s.kept_weights) for n, s in states.items()}
    if options.capacity is None:
        run_pass(trial)
        for name, state in states.items():
            needed = trial[name].needed_capacity(WITHIN_CAPACITY)
            capacity = rounded_capacity(needed, state.guarded.neurons)
            state.guarded = replace(state.guarded, capacity=capacity)
    errors = {n: ErrorStage(s.guarded, s.kept_weights) for n, s in states.items()}
    run_pass(errors)
    return refused + [_finish(state, errors[name]) for name, state in states.items()]


def _start(
    sites: Mapping[str, FFNSite], first: Mapping[str, NeuronStage], options: FFN
) -> dict[str, _Fitting]:
    """Divide the coverage between all sites, then fit and fold each."""
    curves, weights, kept = {}, {}, {}
    for name, site in sites.items():
        histogram = first[name].histogram
        assert histogram is not None
        whole = coverage_curves(histogram, activation(site.weights.activation))
        energy = float(first[name].energy) / max(first[name].moments.count, 1)
        cost = site.weights.w2.detach().double().square().sum(0) / (energy or 1.0)
        kept[name] = _least_linear(whole, cost, options)
        left = others(site.weights.neurons, kept[name])
        curves[name] = CoverageCurves(*(t[left] for t in vars(whole).values()))
        weights[name] = cost[left]
    levels = allocate_coverage(list(curves.values()), list(weights.values()), options.coverage)
    return {
        name: _fit(sites[name], first[name], kept[name], curves[name].select(level), options)
        for name, level in zip(sites, levels, strict=True)
    }


def _least_linear(curves: CoverageCurves, cost: Tensor, options: FFN) -> Tensor:
    """Return the neurons to keep: those that cost most if all had the same coverage."""
    level = min(
        range(len(COVERAGE_LEVELS)), key=lambda i: abs(COVERAGE_LEVELS[i] - options.coverage)
    )
    count = kept_count(cost.numel(), options.keep)
    return select_kept((curves.error[:, level] * cost).cpu(), count)[0]


def _fit(
    site: FFNSite,
    first: NeuronStage,
    kept: Tensor,
    ranges: tuple[Tensor, Tensor],
    options: FFN,
) -> _Fitting:
    assert first.histogram is not None
    weights = site.weights
    left = others(weights.neurons, kept)
    folded = replace(weights.select(left), b2=weights.b2)
    sigma = activation(weights.activation)
    low, high = (t.float() for t in ranges)
    every = torch.zeros(2, weights.neurons, dtype=torch.float64)
    every[:, left] = torch.stack([r.cpu() for r in ranges])
    moments = range_moments(first.histogram, sigma, every[0], every[1])
    chosen = type(moments)(*(t[left] for t in vars(moments).values()))
    fit = least_squares_affine(sigma, ranges[0], ranges[1], chosen)
    fit = _as_stored(weights, fit, low, high)
    matrix, bias = fold_affine(folded, fit)
    certified = options.predictor_kind != "none"
    predictor = make_predictor(
        options.predictor_kind,
        folded,
        options,
        first.moments.input_mean,
        first.moments.input_covariance,
        certified=certified,
    )
    share = 1.0 if options.capacity is None else options.capacity
    guarded = replace(
        blank(
            folded,
            low=low,
            high=high,
            predictor=predictor,
            predictor_kind=options.predictor_kind,
            exact=True,
            capacity=rounded_capacity(share * folded.neurons, folded.neurons),
            overflow="dense",
        ),
        up_slope=fit.slope.float(),
        intercept=fit.intercept.float(),
        folded=matrix.float(),
        folded_bias=bias.float(),
    )
    bound = folded_bound(folded.w2.detach(), fit.max_error)
    return _Fitting(site, kept, left, weights.select(kept), guarded, bound)


def _as_stored(weights: FFNWeights, fit: AffineFit, low: Tensor, high: Tensor) -> AffineFit:
    """Return the fit with the float32 values that the plan stores, and their certified error."""
    slope, intercept = fit.slope.float().double(), fit.intercept.float().double()
    low, high = low.double(), high.double()
    error = max_affine_error(activation(weights.activation), low, high, slope, intercept)
    return AffineFit(low, high, slope, intercept, error)


def _finish(state: _Fitting, error: ErrorStage) -> FFNFit:
    bound = state.bound.float()
    bound = torch.where(
        bound.double() < state.bound, bound.nextafter(torch.tensor(torch.inf)), bound
    )
    tensors = plan_tensors(state.guarded, state.kept) | {"bound": bound.cpu()}
    details = guard_details(state.site, state.kept, state.guarded, error)
    details["largest_bound"] = float(bound.max()) if bound.numel() else 0.0
    return FFNFit(state.site.name, *errors_of(error), tensors=tensors, details=details)
