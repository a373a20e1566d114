"""``nbl.plan``: calibrate once, try everything, and pick what a budget asks for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import expm1, inf, log1p
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from nbl_compiler.batches import Batch
from nbl_compiler.calibration import Calibrated, observe_forms
from nbl_compiler.config import FFN, Config
from nbl_compiler.cost import Machine
from nbl_compiler.errors import CalibrationError, ConfigError
from nbl_compiler.ffn.stand_in import folded_ffn
from nbl_compiler.held_back import all_but_last
from nbl_compiler.loss_trial import Trial
from nbl_compiler.machine import measure_machine
from nbl_compiler.models import hidden_size
from nbl_compiler.passes.switches import StandIn, linear_map
from nbl_compiler.planning.budget import Budget, Space
from nbl_compiler.planning.costs import StepCost, step_cost
from nbl_compiler.planning.front import Front, Point, pick
from nbl_compiler.planning.search import Choice, State, pareto, search
from nbl_compiler.plans import Plan, Site
from nbl_compiler.registry import attach
from nbl_compiler.select import attention_site, ffn_site
from nbl_compiler.several_processes import several_processes
from nbl_compiler.shared_copy import int8_copy
from nbl_compiler.trial_text import MOST_KINDS, kinds_of_text

# Tokens a trial: half of what choosing by rank takes, for there are many more of them.
PLAN_TOKENS = 1024
# The front goes on to this many times the budget, so that a user sees what more would cost.
BEYOND = 1.5


@dataclass(frozen=True)
class _Setting:
    """One way to treat all sites of a kind: the sites that allow it, as they would be."""

    name: str
    sites: Mapping[str, Site]
    stand_ins: Mapping[str, StandIn]


def plan(
    model: nn.Module,
    batches: Iterable[Batch],
    budget: Budget,
    space: Space | None = None,
    *,
    measure: bool = False,
    progress: bool = True,
) -> Front:
    """Find the fastest plan within a loss, or the best plan of a speed; attach it to the model.

    Every site is calibrated in every setting on one part of the text. On the rest each is tried
    alone, and then together with others on the way from the dense model to the fastest: the loss
    of every point is measured, all its changes at once. What a setting saves comes from the bytes
    and the arithmetic of the step that the budget names, at rates measured on this machine, or is
    measured site by site.

    Args:
        model: In eval mode; as for ``nbl.calibrate``, which also says what may go wrong.
        batches: See there. Gone through once, and once more for each form of FFNs without a guard.
        budget: What to reach.
        space: The settings to choose from, by default those that suit the step
            (``Space.suited_to``).
        measure: Compile every kind of site in every setting, and time it. Takes a minute or more,
            and twice the model's memory.
        progress: Show progress bars.

    Returns:
        The front; its ``plan`` is the one that the budget picks (the fastest, with a warning, if
        none reaches the speed-up).

    Raises:
        ConfigError: if the model cannot run such a step, or in a ``torch.distributed`` job.
        NBLError: As ``nbl.calibrate``.
    """
    if several_processes():  # they would measure different machines, and search different ways
        raise ConfigError("plan runs in one process; give its plan to the others")
    space = space or Space.suited_to(budget)
    guarded = any(form.guard != "off" for form in space.ffns)
    if budget.int8 and guarded:
        raise ConfigError(
            "Space: guarded FFNs gather rows of float weights; with Budget(int8=True) give ffns "
            'with guard="off"'
        )
    model = getattr(model, "_orig_mod", model)
    aside: list[dict[str, Any]] = []
    kept = all_but_last(model, batches, aside)
    form = space.ffns[0] if space.ffns else None
    config = Config(space.attention, form, space.ridge, space.holdout, space.seed)
    forms = space.ffns or (None,)
    found = observe_forms(model, kept, config, forms, progress=progress)
    settings = _settings(found, space)
    if not any(setting.sites for setting in settings):
        raise CalibrationError("no site of this model can be rewritten by any of the settings")
    machine = measure_machine(width=hidden_size(model), codes=guarded or budget.int8)
    dense, costs = _costs(model, found, settings, budget, machine, measure)
    trial = _trial(model, found[0], aside, residual=_reads_residual(space))
    tried, states = _search(settings, dense, costs, trial, budget, progress)
    front = pareto(states)
    points = tuple(_point(state, _loss(state, trial), settings, dense, budget) for state in front)

    def plan_at(index: int) -> Plan:
        return _chosen_plan(found, settings, front[index])

    chosen = pick(points, budget)
    made = plan_at(chosen)
    attach(model, made)
    return Front(points, budget, chosen, made, plan_at, tuple(tried))


def _costs(
    model: nn.Module,
    found: Sequence[Calibrated],
    settings: Sequence[_Setting],
    budget: Budget,
    machine: Machine,
    measure: bool,
) -> tuple[StepCost, dict[str, StepCost]]:
    """Return what the step costs dense, and with each setting wherever it goes.

    With int8 weights the dense step is that of the int8 model, but for the time of the model that
    speed-ups are over.
    """
    runs = int8_copy(model) if budget.int8 else model
    dense = step_cost(runs, Plan(), budget, machine, measure=measure)
    if budget.int8:
        loaded = step_cost(model, Plan(), budget, machine, measure=measure)
        dense = replace(dense, dense=loaded.dense)
    plans = {s.name: _plan(found, s.sites) for s in settings}
    return dense, {
        name: step_cost(runs, plan, budget, machine, measure=measure)
        for name, plan in plans.items()
    }


def _reads_residual(space: Space) -> bool:
    return space.attention is not None and space.attention.input == "residual"


def _settings(found: Sequence[Calibrated], space: Space) -> list[_Setting]:
    """Return what may be done, as sites of a plan and as stand-ins for trials."""
    settings = []
    if space.attention is not None:
        maps = found[0].candidates
        states = space.attention.states
        told = "mixed values" if states.mixed else "states"
        name = "linear attention" + (f", with {told}" if states else "")
        sites = {c.name: attention_site(c, True, name) for c in maps}
        stand_ins = {c.name: linear_map(c.fit.weight, c.fit.bias) for c in maps}
        settings.append(_Setting(name, sites, stand_ins))
    for form, calibrated in zip(space.ffns, found, strict=False):
        observed = calibrated.observation.ffn
        fits = [fit for fit in calibrated.fits if not fit.refusal]
        if observed is None or not fits:
            continue
        name = _name_of(form)
        sites = {fit.name: ffn_site(fit, True, name) for fit in fits}
        stand_ins = {fit.name: folded_ffn(observed.sites[fit.name].weights, fit) for fit in fits}
        settings.append(_Setting(name, sites, stand_ins))
    return settings


def _name_of(form: FFN) -> str:
    """Return a name of a form that differs between all that differ."""
    plain = FFN()
    told = [f"keep {form.keep:g}"]
    for name in ("guard", "capacity", "coverage", "predictor", "rank", "values"):
        value = getattr(form, name)
        if value != getattr(plain, name):
            told.append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
    return "FFN " + ", ".join(told)


def _plan(found: Sequence[Calibrated], sites: Mapping[str, Site]) -> Plan:
    first = found[0]
    return Plan(tuple(sites.values()), first.fingerprint, first.model, {})


def _trial(
    model: nn.Module, calibrated: Calibrated, aside: list[dict[str, Any]], *, residual: bool
) -> Trial:
    ffn = calibrated.observation.ffn
    names = [c.name for c in calibrated.candidates] + ([] if ffn is None else list(ffn.sites))
    states = {c.name: c.states for c in calibrated.candidates}
    gates = {c.name: c.gates for c in calibrated.candidates}
    # A budget is for text of the user's kind.
    kinds = kinds_of_text(model, aside, PLAN_TOKENS, other=False)
    return Trial(model, names, kinds, residual=residual, states=states, gates=gates)


def _search(
    settings: Sequence[_Setting],
    dense: StepCost,
    costs: Mapping[str, StepCost],
    trial: Trial,
    budget: Budget,
    progress: bool,
) -> tuple[list[Choice], list[State]]:
    """Measure every choice alone, and walk from the dense model on; return both."""
    by_name = {setting.name: setting for setting in settings}

    def attends(choice: Choice) -> bool:
        return by_name[choice.setting].sites[choice.site].kind == "attention"

    def measure(choices: Mapping[str, Choice], *, edited: bool = True) -> float:
        bar.update(1)
        active = {site: by_name[c.setting].stand_ins[site] for site, c in choices.items()}
        # FFNs see one token at a time: without linear attention, text as it is will do. (The first
        # linear attention must then make up for what edited text costs the FFNs before it.)
        edited = edited and any(map(attends, choices.values()))
        return trial(active, kinds=MOST_KINDS if edited else 1)

    def sharpen(choice: Choice) -> Choice:
        """Also look at edited text, which may cost more than text as it is."""
        exact = replace(choice, loss=measure({choice.site: choice}), exact=True)
        choices[choices.index(choice)] = exact
        return exact

    def enough(state: State) -> bool:
        if budget.max_loss is not None:
            return _loss(state, trial) > BEYOND * budget.max_loss
        assert budget.speedup is not None
        return _speedup(state, dense) >= 1 + (budget.speedup - 1) * 1.2

    with torch.no_grad(), tqdm(desc="trying sites", unit="trial", disable=not progress) as bar:
        choices: list[Choice] = []
        for setting in settings:
            cost = costs[setting.name]
            for site in setting.sites:
                if site not in cost.after:  # this step's graph does not allow it
                    continue
                seconds = dense.before[site] - cost.after[site]
                if seconds <= 0:  # slower than dense at this size
                    continue
                choice = Choice(site, setting.name, seconds, 0.0)
                least = measure({site: choice}, edited=False)
                choices.append(replace(choice, loss=least, exact=not attends(choice)))
        limit = inf if budget.max_loss is None else _disturbance(budget.max_loss, trial)
        states = search(choices, measure, enough, sharpen, limit)
    trial.release()
    return choices, states


def _loss(state: State, trial: Trial) -> float:
    """Return the relative increase of perplexity (or the relative error, without tokens)."""
    disturbance = max(state.loss, 0.0)
    return expm1(disturbance) if trial.predicts_tokens else disturbance


def _disturbance(loss: float, trial: Trial) -> float:
    """Return the disturbance that ``_loss`` calls such a loss."""
    return log1p(loss) if trial.predicts_tokens else loss


def _speedup(state: State, dense: StepCost) -> float:
    return dense.dense / (dense.total - state.seconds)


def _point(
    state: State, loss: float, settings: Sequence[_Setting], dense: StepCost, budget: Budget
) -> Point:
    by_name = {setting.name: setting for setting in settings}
    saved = 0
    for site, choice in state.choices.items():
        made = by_name[choice.setting].sites[site]
        saved += made.details["parameters"] - made.parameters_read
    choices = {site: choice.setting for site, choice in state.choices.items()}
    size = 1 if budget.int8 else 4
    return Point(loss, _speedup(state, dense), choices, size * saved)


def _chosen_plan(found: Sequence[Calibrated], settings: Sequence[_Setting], state: State) -> Plan:
    """Return a plan of every site: as chosen, or left dense."""
    by_name: Mapping[str, _Setting] = {setting.name: setting for setting in settings}
    first = found[0]
    attention, ffn = first.config.attention, first.config.ffn
    untouched = first.plan(
        None if attention is None else replace(attention, count=0),
        None if ffn is None else replace(ffn, count=0),
    )
    sites = []
    for site in untouched.sites:
        choice = state.choices.get(site.name)
        if choice is not None:
            made = by_name[choice.setting].sites[site.name]
            reason = f"{made.reason}; costs {choice.loss:.4f} alone"
            sites.append(replace(made, reason=reason))
        elif site.decision == "kept":
            sites.append(replace(site, reason="left dense by the budget"))
        else:
            sites.append(site)
    config = {"planned": {s: c.setting for s, c in state.choices.items()}}
    return Plan(tuple(sites), first.fingerprint, first.model, config)
