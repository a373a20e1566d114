"""From moments to decisions: fit every site, rank, choose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from nbl_compiler.config import Attention, Config
from nbl_compiler.errors import ConfigError
from nbl_compiler.observe import Observation, SiteMoments
from nbl_compiler.plan import Site
from nbl_compiler.solvers.cca import cca_bound
from nbl_compiler.solvers.least_squares import LinearFit, fit_linear


@dataclass(frozen=True)
class Candidate:
    """A site with its fitted map, not yet decided on."""

    name: str
    fit: LinearFit
    cca_bound: float
    details: dict[str, Any]


def decide(observation: Observation, config: Config, *, progress: bool) -> tuple[Site, ...]:
    """Return every site, decided, in model order (rejected ones last).

    Raises:
        ConfigError: if ``layers`` names sites that do not exist, or ``count`` exceeds them.
    """
    assert config.attention is not None
    candidates = [
        _fit(name, site, config)
        for name, site in tqdm(observation.sites.items(), "solving", disable=not progress)
    ]
    chosen = choose(candidates, config.attention)
    sites = [_site(c, *chosen[c.name]) for c in candidates]
    for name, rejected in observation.rejected.items():
        if name not in observation.sites:
            sites.append(Site(name, "attention", "rejected", rejected.reason))
    return tuple(sites)


def _fit(name: str, site: SiteMoments, config: Config) -> Candidate:
    fit = fit_linear(site.train, site.holdout, config.ridge)
    return Candidate(name, fit, cca_bound(site.train), site.details)


def choose(candidates: Sequence[Candidate], options: Attention) -> dict[str, tuple[bool, str]]:
    """Return site name → (replace it?, reason)."""
    score = {
        c.name: c.fit.holdout_nmse if options.rank_by == "nmse" else c.cca_bound for c in candidates
    }
    order = sorted(score, key=lambda name: (math.isnan(score[name]), score[name]))
    rank = {name: i for i, name in enumerate(order)}
    if options.layers is not None:
        wanted = _named(candidates, options.layers)
        return {
            c.name: (c.name in wanted, "named in `layers`" if c.name in wanted else "not in `layers`")
            for c in candidates
        }
    limit = options.max_nmse if options.max_nmse is not None else math.inf
    count = options.count
    if count is None:
        count = len(candidates) if options.max_nmse is not None else math.ceil(len(candidates) / 4)
    if count > len(candidates):
        raise ConfigError(f"count={count} exceeds the {len(candidates)} attention sites that match")
    eligible = [
        name for name in order if next(c for c in candidates if c.name == name).fit.holdout_nmse <= limit
    ]
    taken = set(eligible[:count])
    result = {}
    for c in candidates:
        place = f"rank {rank[c.name] + 1} of {len(candidates)} by {options.rank_by}"
        if c.name not in eligible:
            place = f"held-out NMSE {c.fit.holdout_nmse:.3f} exceeds max_nmse={limit:g}"
        result[c.name] = (c.name in taken, place)
    return result


def _named(candidates: Sequence[Candidate], layers: Sequence[int | str]) -> set[str]:
    names = [c.name for c in candidates]
    chosen = set()
    for layer in layers:
        if isinstance(layer, str):
            if layer not in names:
                raise ConfigError(f"layers names {layer!r}, which is no matched site; sites: {names}")
            chosen.add(layer)
        else:
            if not -len(names) <= layer < len(names):
                raise ConfigError(f"layers holds {layer}, but the model has {len(names)} sites")
            chosen.add(names[layer])
    return chosen


def _site(candidate: Candidate, replace: bool, reason: str) -> Site:
    fit = candidate.fit
    tensors = {}
    if replace:
        tensors = {
            "weight": fit.weight.to("cpu", torch.float32).contiguous(),
            "bias": fit.bias.to("cpu", torch.float32).contiguous(),
        }
    details = {
        **candidate.details,
        "ridge": fit.ridge,
        "rank": fit.rank,
        "width_in": fit.weight.shape[1],
        "width_out": fit.weight.shape[0],
    }
    return Site(
        candidate.name, "attention", "rewritten" if replace else "kept", reason,
        fit.nmse, fit.holdout_nmse, candidate.cca_bound, tensors, details,
    )  # fmt: skip
