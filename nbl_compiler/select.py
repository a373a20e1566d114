"""From moments to decisions: fit every site, rank, choose."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from nbl_compiler.config import FFN, Attention, Config
from nbl_compiler.errors import ConfigError
from nbl_compiler.ffn.sites import FFNFit
from nbl_compiler.monitoring.statistics import input_statistics
from nbl_compiler.observe import Observation, SiteMoments
from nbl_compiler.passes.base import Rejected
from nbl_compiler.passes.own_weights import OwnWeights
from nbl_compiler.plans import Decision, Site
from nbl_compiler.solvers.attention_prior import attention_prior
from nbl_compiler.solvers.cca import cca_bound
from nbl_compiler.solvers.least_squares import LinearFit, fit_linear
from nbl_compiler.solvers.moments import Moments
from nbl_compiler.value_states import NO_STATES, Gates, States, split_weight

# A vector of state has to lower the held-out error by this fraction: below, it is noise.
PRICE_OF_A_STATE = 0.002
# Errors below this are rounding, of which no state can be said to lower it.
NEGLIGIBLE = 1e-6


@dataclass(frozen=True)
class Candidate:
    """A site with its fitted map, not yet decided on.

    ``loss_rank`` is its place in the order that least disturbs the model's predictions, if that
    was measured (``rank_by="loss"``); ``inputs`` describes what the map reads, ``states`` what it
    reads of the values besides, with ``gates`` if these are mixed.
    """

    name: str
    fit: LinearFit
    cca_bound: float
    details: dict[str, Any]
    states: States = NO_STATES
    loss_rank: int | None = None
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    gates: Gates | None = None

    @property
    def holdout_nmse(self) -> float:
        """Of the map."""
        return self.fit.holdout_nmse


def fit_sites(observation: Observation, config: Config, *, progress: bool) -> tuple[Candidate, ...]:
    """Fit the map of every matched site, in model order."""
    return tuple(
        _fit(name, site, config)
        for name, site in tqdm(observation.sites.items(), "solving", disable=not progress)
    )


def decide(
    candidates: Sequence[Candidate], rejected: Mapping[str, Rejected], attention: Attention
) -> tuple[Site, ...]:
    """Return every site, decided, in model order (rejected ones last).

    Raises:
        ConfigError: if ``layers`` names sites that do not exist, or ``count`` exceeds them.
    """
    holdout = {c.name: c.holdout_nmse for c in candidates}
    check_selection(list(holdout), attention)
    scores = {c.name: c.cca_bound for c in candidates} if attention.rank_by == "cca" else holdout
    order, rank_by = _ordered(scores, {c.name: c.loss_rank for c in candidates}, attention)
    chosen = choose(holdout, order, attention, rank_by)
    sites = [attention_site(c, *chosen[c.name]) for c in candidates]
    sites += [
        Site(name, "attention", "rejected", why.reason)
        for name, why in rejected.items()
        if name not in chosen
    ]
    return tuple(sites)


def decide_ffn(
    fits: Sequence[FFNFit], rejected: Mapping[str, Rejected], options: FFN
) -> tuple[Site, ...]:
    """Return every FFN site, decided, in model order (rejected ones last).

    Raises:
        ConfigError: if ``layers`` names sites that do not exist, or ``count`` exceeds them.
    """
    able = {fit.name: fit.holdout_nmse for fit in fits if not fit.refusal}
    every = {fit.name: fit.holdout_nmse for fit in fits}
    # Indices and `count` are about all matched sites, also those that this form cannot fold.
    check_selection(list(every), options)
    if options.count is not None:
        options = replace(options, count=min(options.count, len(able)))
    pool = able if options.layers is None else every
    ranks = {fit.name: fit.loss_rank for fit in fits if not fit.refusal}
    order, rank_by = _ordered(able, ranks, options)
    chosen = choose(pool, order, options, rank_by)
    sites = [ffn_site(fit, *chosen.get(fit.name, (False, ""))) for fit in fits]
    sites += [
        Site(name, "ffn", "rejected", why.reason)
        for name, why in rejected.items()
        if name not in every
    ]
    return tuple(sites)


def ffn_site(fit: FFNFit, replace: bool, reason: str) -> Site:
    """Return a site with its fit, or left as it is; one that cannot be folded is rejected."""
    decision: Decision = "rewritten" if replace and not fit.refusal else "kept"
    return Site(
        fit.name,
        "ffn",
        "rejected" if fit.refusal else decision,
        fit.refusal or reason,
        fit.nmse,
        fit.holdout_nmse,
        tensors=fit.tensors if decision == "rewritten" else {},
        details=fit.details,
        inputs=fit.inputs if decision == "rewritten" else {},
    )


def _fit(name: str, site: SiteMoments, config: Config) -> Candidate:
    train, holdout = site.train, site.holdout
    width = site.details.get("width_in", train.xx.shape[0])
    own = train
    if site.states:
        own = train.of_inputs(torch.arange(width, device=train.xx.device))
        fits = _fit_mixed if site.states.mixed else _fit_states
        chosen, fit = fits(site, width, config)
    else:
        prior = _prior(train, site.own)
        chosen, fit = NO_STATES, fit_linear(train, holdout, config.ridge, prior)
    count = max(own.count, 1)
    variance = own.xx.diagonal() / count - (own.sum_x / count).square()
    inputs = input_statistics(own.mean_x, variance)
    gates = site.gates if chosen.mixed else None
    return Candidate(name, fit, cca_bound(own), site.details, chosen, inputs=inputs, gates=gates)


def _fit_states(site: SiteMoments, width: int, config: Config) -> tuple[States, LinearFit]:
    """Return the states that earn their place by the held-out error, and the fit with them."""
    train, seen = site.train, site.states
    each = (train.xx.shape[0] - width) // seen.vectors
    best: tuple[float, States, LinearFit] | None = None
    for states in _subsets(seen):
        columns = torch.arange(train.xx.shape[0], device=train.xx.device)
        kept = columns < width
        if states.taps:
            kept |= (columns >= width) & (columns < width + seen.taps * each)
        if states.averages:
            kept |= columns >= width + seen.taps * each
        some = columns[kept]
        part = train.of_inputs(some)
        prior = _prior(part, site.own)
        fit = fit_linear(part, site.holdout.of_inputs(some), config.ridge, prior)
        cost = (fit.holdout_nmse + NEGLIGIBLE) * (1 + PRICE_OF_A_STATE * states.vectors)
        if best is None or cost < best[0]:
            best = (cost, states, fit)
    assert best is not None
    return best[1:]


def _fit_mixed(site: SiteMoments, width: int, config: Config) -> tuple[States, LinearFit]:
    """Return the fit with mixed values, shrunk towards what the site's own output projection makes
    of them; or without, where that is as good."""
    train, holdout = site.train, site.holdout
    prior = None
    if site.own is not None:
        output = site.own.output.flatten(1)  # y = O c, if the gates were attention's weights
        prior = torch.cat([output.new_zeros(len(output), width), output], 1)
    mixed = fit_linear(train, holdout, config.ridge, prior)
    own = torch.arange(width, device=train.xx.device)
    part = train.of_inputs(own)
    plain = fit_linear(part, holdout.of_inputs(own), config.ridge, _prior(part, site.own))
    if mixed.holdout_nmse < plain.holdout_nmse * (1 - PRICE_OF_A_STATE) + NEGLIGIBLE:
        return site.states, mixed
    return NO_STATES, plain


def _prior(moments: Moments, own: OwnWeights | None) -> Tensor | None:
    return None if own is None else attention_prior(moments, own.value, own.output)


def _subsets(seen: States) -> list[States]:
    taps = sorted({0, seen.taps})
    averages = sorted({False, seen.averages})
    return [States(w, a) for w in taps for a in averages]


def choose(
    holdout: Mapping[str, float], order: Sequence[str], options: Attention | FFN, rank_by: str
) -> dict[str, tuple[bool, str]]:
    """Return site name → (replace it?, reason).

    Args:
        holdout: Site name → held-out NMSE, in model order.
        order: The names, best first.
        options: How to choose.
        rank_by: What ``order`` goes by, for the reasons.

    Raises:
        ConfigError: if ``layers`` names sites that do not exist, or ``count`` exceeds them.
    """
    names = list(holdout)
    check_selection(names, options)
    limit = math.inf if options.max_nmse is None else options.max_nmse
    beyond = {name for name, nmse in holdout.items() if nmse > limit}
    if options.layers is not None:
        named = {layer if isinstance(layer, str) else names[layer] for layer in options.layers}
        taken = named - beyond
        reasons = {n: "named in `layers`" if n in named else "not in `layers`" for n in names}
    else:
        within = [name for name in order if name not in beyond]
        taken = set(within[: wanted_count(len(names), options)])
        reasons = {
            name: f"rank {rank} of {len(order)} by {rank_by}"
            for rank, name in enumerate(order, start=1)
        }
    for name in beyond:
        reasons[name] = f"held-out NMSE {holdout[name]:.3f} exceeds max_nmse={limit:g}"
    return {name: (name in taken, reasons[name]) for name in names}


def check_selection(names: Sequence[str], options: Attention | FFN) -> None:
    """Raise unless every site that the options ask for is among the matched ones.

    Args:
        names: Matched sites in model order.
        options: What was asked for.

    Raises:
        ConfigError: if ``layers`` names sites that do not exist, or ``count`` exceeds them.
    """
    for layer in options.layers or ():
        if isinstance(layer, str) and layer not in names:
            known = ", ".join(names)
            raise ConfigError(f"layers names {layer!r}, which is no matched site; sites: {known}")
        if isinstance(layer, int) and not -len(names) <= layer < len(names):
            raise ConfigError(f"layers holds {layer}, but the model has {len(names)} sites")
    if options.count is not None and options.count > len(names):
        raise ConfigError(
            f"count={options.count} exceeds the {len(names)} {_kind(options)} sites that match"
        )


def _kind(options: Attention | FFN) -> str:
    return "FFN" if isinstance(options, FFN) else "attention"


def needs_trials(options: Attention | FFN | None, sites: int = sys.maxsize) -> bool:
    """Tell whether trials have to choose, because the options neither name the sites nor take all.

    Args:
        options: How to choose; None if such sites are left alone.
        sites: How many there are; by default as many as it takes for a choice.
    """
    if options is None or options.rank_by != "loss" or options.layers is not None:
        return False
    return 0 < wanted_count(sites, options) < sites


def _ordered(
    scores: Mapping[str, float], ranks: Mapping[str, int | None], options: Attention | FFN
) -> tuple[list[str], str]:
    """Return the site names, best first, and what they were ranked by.

    Raises:
        ConfigError: if the choice depends on trials that were not made.
    """
    if options.rank_by != "loss":
        return best_first(scores), options.rank_by
    known = {name: rank for name, rank in ranks.items() if rank is not None}
    if len(known) == len(ranks):
        return sorted(known, key=lambda name: known[name]), "loss"
    if needs_trials(options, len(scores)):
        raise ConfigError('rank_by="loss" was not measured; calibrate with it')
    return best_first(scores), "nmse"


def best_first(score: Mapping[str, float]) -> list[str]:
    """Return the names by ascending score; NaN comes last."""
    return sorted(score, key=lambda name: (math.isnan(score[name]), score[name]))


def wanted_count(sites: int, options: Attention | FFN) -> int:
    """Return how many of the eligible sites the options ask for."""
    if options.count is not None:
        return options.count
    return sites if options.max_nmse is not None else math.ceil(sites / 4)


def attention_site(candidate: Candidate, replace: bool, reason: str) -> Site:
    """Return a site with its candidate's map, or left as it is."""
    fit = candidate.fit
    tensors = {}
    width, states = candidate.details.get("width_in", fit.weight.shape[1]), candidate.states
    if replace:
        tensors = split_weight(fit.weight.to("cpu", torch.float32), width, states)
        if candidate.gates is not None:
            tensors |= candidate.gates.tensors()
        tensors["bias"] = fit.bias.to("cpu", torch.float32).contiguous()
    details = {
        **candidate.details,
        "ridge": fit.ridge,
        "prior": "own weights" if fit.shrunk_to_prior else "zero",
        "rank": fit.rank,
        "width_in": width,
        "width_out": fit.weight.shape[0],
    }
    if states:
        details |= {"taps": states.taps, "averages": states.averages}
        read = fit.weight.numel() + fit.bias.numel() + candidate.details["value_parameters"]
        if candidate.gates is not None:
            details["mixed"] = True
            read += sum(tensor.numel() for tensor in candidate.gates.tensors().values())
        details["parameters_read"] = read
        reason = f"{reason}; reads {states}"
    return Site(
        candidate.name, "attention", "rewritten" if replace else "kept", reason,
        fit.nmse, fit.holdout_nmse, candidate.cca_bound, tensors, details,
        candidate.inputs if replace else {},
    )  # fmt: skip
