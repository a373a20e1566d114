"""``rank_by="loss"``: the order in which sites are best replaced, found in the model itself.

What an error in one layer costs depends on the rest of the model, which no score of the layer
alone (NMSE, CCA) knows; and two maps that are harmless alone may not be so together. So sites are
tried (``loss_trial.py``): first each alone, then greedily, each time adding the one of the next few
that adds least to the disturbance of the model's predictions. A trial ends as soon as it is clear
that its sites will not be among the next few.

Attention is tried on four kinds of text, and a site's worst one counts. Text as it is; text that
repeats itself; recoded text, in which each row's most frequent tokens are others; and what the
model writes itself. Some layers look for what followed an earlier occurrence of a token (induction
heads, arXiv 2209.11895), or pick up the conventions of a text (spaces in front of commas, say) from
what came before; no map of one token can do either. Ordinary text of a few hundred tokens hardly
needs them, long contexts and texts of another kind than the calibration's do. And a map may fit one
kind of text much better than all others, which only others tell. An FFN sees one token at a time,
so for FFNs text as it is will do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn
from tqdm.auto import tqdm

from nbl_compiler.config import FFN, Attention
from nbl_compiler.ffn.sites import FFNFit, FFNSite
from nbl_compiler.ffn.stand_in import folded_ffn
from nbl_compiler.loss_trial import Trial
from nbl_compiler.passes.switches import StandIn, linear_map
from nbl_compiler.select import Candidate, needs_trials, wanted_count
from nbl_compiler.several_processes import ALONE, Share
from nbl_compiler.trial_text import few_rows, kinds_of_text

# How many of the sites that are best alone compete for the next place.
COMPETITORS = 4

Ranked = TypeVar("Ranked", Candidate, FFNFit)


def rank_attention(
    model: nn.Module,
    candidates: Sequence[Candidate],
    batches: Iterable[Mapping[str, Any]],
    options: Attention,
    *,
    share: Share = ALONE,
    progress: bool,
) -> tuple[Candidate, ...]:
    """Return the candidates with their ``loss_rank``, and what they cost alone in the details.

    That is ``loss`` (nats), or, of those that are too dear to be tried together with others, a
    lower bound of it, ``loss_at_least``.

    Args:
        model: The dense model.
        candidates: Sites with their maps.
        batches: Model inputs that the maps were not fitted on.
        options: Say how many sites are wanted (further ones are in no exact order), and what the
            maps read.
        share: Of the trials' text, if all processes of a job have the same (see ``Trial``).
        progress: Show a progress bar.

    Raises:
        ConfigError: if the model returns nothing that can be compared.
    """
    if not needs_trials(options, len(candidates)):
        return tuple(candidates)
    kinds = kinds_of_text(model, list(batches))
    maps = {c.name: linear_map(c.fit.weight, c.fit.bias) for c in candidates}
    states = {c.name: c.states for c in candidates}
    residual = options.input == "residual"
    gates = {c.name: c.gates for c in candidates}
    trial = Trial(model, maps, kinds, residual=residual, states=states, gates=gates, share=share)
    return _ranked(candidates, trial, maps, options, progress)


def rank_ffns(
    model: nn.Module,
    sites: Mapping[str, FFNSite],
    fits: Sequence[FFNFit],
    batches: Iterable[Mapping[str, Any]],
    options: FFN,
    *,
    share: Share = ALONE,
    progress: bool,
) -> tuple[FFNFit, ...]:
    """Return the fits with their ``loss_rank``, and what they cost alone in the details.

    Args:
        model: The dense model.
        sites: Site name → the FFN as calibration saw it.
        fits: The folded FFNs; refused ones get no rank.
        batches: Model inputs that the fits have not seen.
        options: Say how many sites are wanted.
        share: Of the trials' text, if all processes of a job have the same (see ``Trial``).
        progress: Show a progress bar.

    Raises:
        ConfigError: if the model returns nothing that can be compared.
    """
    able = {fit.name: fit for fit in fits if not fit.refusal}
    if not needs_trials(options, len(able)):
        return tuple(fits)
    folded = {name: folded_ffn(sites[name].weights, fit) for name, fit in able.items()}
    text = (few_rows(model, list(batches)),)
    trial = Trial(model, folded, text, residual=False, share=share)
    return _ranked(fits, trial, folded, options, progress)


Kinds = Mapping[int, float]
"""Kind of text → disturbance."""


def greedy_order(
    alone: Mapping[str, Kinds],
    depth: int,
    disturbance: Callable[[Sequence[str], Kinds, float], Kinds],
) -> list[str]:
    """Return all names, the first ``depth`` chosen greedily for what they do together.

    Each time the name is added that adds least, on the kind of text to which it adds most. (The
    least of the worst kind's sum would do otherwise: what adds to other kinds would cost nothing as
    long as another kind is worse.)

    Args:
        alone: Name → disturbances of that one alone.
        depth: How many places to fill greedily.
        disturbance: Of several together; once a kind is more than a limit above what it was before,
            others may be left out.
    """
    left = sorted(alone, key=lambda name: worst(alone[name]))
    chosen = left[:1]
    before = alone[chosen[0]] if chosen else {}
    left = left[1:]
    while left and len(chosen) < depth:
        best, least, after = left[0], math.inf, before
        for name in left[:COMPETITORS]:
            together = disturbance([*chosen, name], before, least)
            adds = max(together[kind] - before[kind] for kind in together)
            if adds < least:
                best, least, after = name, adds, together
        chosen.append(best)
        left.remove(best)
        before = after
    return chosen + left


def best_alone(
    names: Sequence[str], places: int, disturbance: Callable[[str, float], Kinds]
) -> tuple[dict[str, Kinds], frozenset[str]]:
    """Return name → disturbances alone, and those of which the worst is but a lower bound.

    The ``places`` smallest are none of these, and no bound is below them.

    Args:
        names: The sooner the best ones come, the fewer trials run to their end.
        places: How many must be known.
        disturbance: Of one name; once a kind is above a limit, others may be left out.
    """
    alone: dict[str, Kinds] = {}
    bounds = set()
    for name in names:
        known = sorted(map(worst, alone.values()))
        limit = known[places - 1] if len(known) >= places else math.inf
        alone[name] = disturbance(name, limit)
        if worst(alone[name]) > limit:
            bounds.add(name)
    return alone, frozenset(bounds)


def worst(kinds: Kinds) -> float:
    """Return the disturbance on the worst kind of text."""
    return max(kinds.values())


def _ranked(
    found: Sequence[Ranked],
    trial: Trial,
    stand_ins: Mapping[str, StandIn],
    options: Attention | FFN,
    progress: bool,
) -> tuple[Ranked, ...]:
    """Try those with a stand-in and return all, with their place and their disturbance alone."""
    names = sorted(stand_ins, key={one.name: one.holdout_nmse for one in found}.__getitem__)
    depth = min(wanted_count(len(names), options), len(names))
    total = len(names) + max(depth - 1, 0) * COMPETITORS
    with torch.no_grad(), tqdm(total=total, desc="ranking", disable=not progress) as bar:

        def of_one(name: str, limit: float) -> Kinds:
            bar.update(1)
            return trial.each_kind({name: stand_ins[name]}, limit=limit)

        def of_several(active: Sequence[str], before: Kinds, limit: float) -> Kinds:
            bar.update(1)
            together = {name: stand_ins[name] for name in active}
            return trial.each_kind(together, before=before, limit=limit)

        alone, bounds = best_alone(names, depth + COMPETITORS - 1, of_one)
        places = {n: place for place, n in enumerate(greedy_order(alone, depth, of_several))}
    trial.release()

    def tried(one: Ranked) -> Ranked:
        known = "loss_at_least" if one.name in bounds else "loss"
        details = {**one.details, known: worst(alone[one.name])}
        return replace(one, loss_rank=places[one.name], details=details)

    return tuple(tried(one) if one.name in places else one for one in found)
