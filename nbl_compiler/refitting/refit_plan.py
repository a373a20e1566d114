"""``nbl.refit``: fit a plan's maps anew, in model order, on the stream that the plan leaves."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from tqdm.auto import tqdm

from nbl_compiler.batches import Batch, model_inputs
from nbl_compiler.calibration_checks import check_request
from nbl_compiler.config import Ridge
from nbl_compiler.errors import CalibrationError, ConfigError
from nbl_compiler.held_back import all_but_last
from nbl_compiler.loss_trial import Trial
from nbl_compiler.plans import Plan, Site
from nbl_compiler.refitting.regression import fit, prior_of, refusal, rows_of, stand_in, with_map
from nbl_compiler.refitting.route import Values
from nbl_compiler.refitting.store import Store
from nbl_compiler.refitting.target import correction
from nbl_compiler.refitting.traced import Place, Recorded, record
from nbl_compiler.registry import attach
from nbl_compiler.rows import RowChooser
from nbl_compiler.several_processes import several_processes
from nbl_compiler.solvers.ffn_moments import RegressionMoments
from nbl_compiler.solvers.ffn_regression import AffineMap, squared_errors
from nbl_compiler.solvers.folding import FFNWeights
from nbl_compiler.text_pass import device_of
from nbl_compiler.trial_text import few_rows, kinds_of_text
from nbl_compiler.value_states import gates_of, states_of

# How much of what is missing from the stream a site is asked to put back.
STRENGTHS = (0.0, 0.5, 1.0)


def refit(
    model: nn.Module,
    plan: Plan,
    batches: Iterable[Batch],
    *,
    ridge: Ridge = "auto",
    holdout: float = 0.1,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Plan:
    """Fit a plan's maps anew, one site after another, with the dense model as their teacher.

    Calibration fits every map on the dense model's stream. Here the first site's map is fitted
    again, then the second's on the stream that the first leaves, and so on; and what a site is
    asked to give brings that stream back to the dense model's (``refitting/target.py``). The
    ridge, towards what the plan holds, is chosen on held-out tokens. On text that no map was fitted
    on, each site then takes what disturbs the model's predictions least: a new map of one of
    several strengths, or the plan's own. So the loss on that text never rises; with attention among
    the sites, on the worst of the kinds of text that ``rank_by="loss"`` tries.

    Every layer runs twice over the text, dense and compressed, whatever the number of sites. What
    lies between two sites is kept on disk: memory does not grow with the text.

    Args:
        model: The dense model, as it was calibrated.
        plan: Its plan. Exact guards and FFNs of kept neurons alone stay as they are.
        batches: As for ``nbl.calibrate``: best the same text, or more. The last of it is held back
            for the comparison.
        ridge: ρ towards the plan's maps, or ``"auto"``.
        holdout: Share of the tokens that choose it; as for the plan.
        seed: Of that choice; as for the plan.
        folder: Where to keep what lies between two sites. A run that was interrupted goes on from
            there, given the same arguments. By default a temporary folder.
        progress: Show progress bars.

    Returns:
        The new plan, attached to the model.

    Raises:
        ConfigError: if the folder holds something else, or in a ``torch.distributed`` job.
        PlanMismatchError: if the plan was calibrated on other weights.
        CalibrationError: if no site can be fitted anew, a batch does not show all sites in one
            graph, or activations hold NaN or infinity.
    """
    if several_processes():
        raise ConfigError("refit runs in one process; give its plan to the others")
    model = getattr(model, "_orig_mod", model)
    check_request(model)
    attach(model, plan)
    aside: list[dict[str, Any]] = []
    device = device_of(model)
    inputs = [model_inputs(model, b, device) for b in all_but_last(model, batches, aside)]
    work = _Work(plan, inputs, record(model, plan, inputs), RowChooser(holdout, seed), ridge)
    trial = _trial(model, plan, aside)
    key = _key(plan, inputs, (ridge, holdout, seed))
    with tempfile.TemporaryDirectory(prefix="nbl-refit-") as own:
        store = Store(Path(own) / "run" if folder is None else Path(folder), key)
        with torch.no_grad():
            made = _all_sites(work, trial, store, progress)
        store.clear()
    trial.release()
    attach(model, made)
    return made


@dataclass(frozen=True)
class _Work:
    """What stays the same from site to site."""

    plan: Plan
    inputs: Sequence[Mapping[str, Any]]
    recorded: Sequence[Recorded]
    rows: RowChooser
    ridge: Ridge

    @property
    def weights(self) -> dict[str, FFNWeights | None]:
        """Site name → the FFN's own weights; None for attention."""
        return {place.site: place.weights for place in self.recorded[0].traced.places}


def _trial(model: nn.Module, plan: Plan, aside: Sequence[Mapping[str, Any]]) -> Trial:
    """Return the comparison with the dense model, on the kinds of text that sites are chosen by."""
    sites = plan.rewritten
    attention = any(site.kind == "attention" for site in sites)
    return Trial(
        model,
        [site.name for site in sites],
        kinds_of_text(model, aside) if attention else [few_rows(model, aside)],
        residual=any(site.details.get("input") == "residual" for site in sites),
        states={site.name: states_of(site.details) for site in sites if site.kind == "attention"},
        gates={site.name: gates_of(site.tensors) for site in sites},
    )


def _all_sites(work: _Work, trial: Trial, store: Store, progress: bool) -> Plan:
    weights = work.weights
    order = [name for name in weights if not refusal(work.plan.site(name))]
    if not order:
        reasons = "; ".join(f"{name}: {refusal(work.plan.site(name))}" for name in weights)
        raise CalibrationError(f"no site of this plan can be fitted anew ({reasons})")
    plan, facts = store.plan(work.plan), store.facts

    def loss_of(sites: Iterable[Site]) -> float:
        return trial({site.name: stand_in(site, weights[site.name]) for site in sites})

    if not facts:
        before = loss_of(plan.rewritten)
        facts = {"loss_before": before, "loss_after": before}
    bar = tqdm(total=len(order), desc="refitting", unit="site", disable=not progress)
    with bar:
        bar.update(store.done)
        for name in order[store.done :]:
            chosen = plan.site(name)
            for site in _candidates(work, plan, name, store):
                loss = loss_of(_with(plan, site).rewritten)
                if loss < facts["loss_after"]:
                    chosen, facts["loss_after"] = site, loss
            plan = _with(plan, chosen)
            store.finish_site(plan, facts)
            bar.set_postfix_str(f"loss {facts['loss_after']:.4f}", refresh=False)
            bar.update(1)
    return replace(plan, config={**plan.config, "refit": facts})


def _with(plan: Plan, site: Site) -> Plan:
    sites = tuple(site if old.name == site.name else old for old in plan.sites)
    return replace(plan, sites=sites)


def _candidates(work: _Work, plan: Plan, name: str, store: Store) -> list[Site]:
    """Run all batches up to a site, keep what lies there, and fit the site in every strength."""
    moments = _Moments(plan.site(name))
    previous = store.done
    for number, (batch, inputs) in enumerate(zip(work.recorded, work.inputs, strict=True)):
        places = [p for p in batch.traced.places if not refusal(plan.site(p.site))]
        place = places[previous]
        dense_start = places[previous - 1].end if previous else 0
        compressed_start = places[previous - 1].cut if previous else 0
        dense, compressed = store.load(number, batch.inputs)
        dense = batch.traced.dense.advance(dense, batch.inputs, dense_start, place.end, {})
        stand_ins = {
            p.site: stand_in(plan.site(p.site), p.weights)
            for p in batch.traced.places
            if p.cut < place.cut
        }
        compressed = batch.traced.compressed.advance(
            compressed, batch.inputs, compressed_start, place.cut, stand_ins
        )
        store.save(number, (dense, compressed), batch.inputs)
        work.rows.start_batch(inputs)
        moments.add(place, dense, compressed, batch.inputs, work.rows)
    return moments.fits(work.ridge)


class _Moments:
    """Adds up one site's tokens for every strength at once: their targets stand side by side."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._width = site.tensors["bias"].numel()
        regressors = prior_of(site).shape[1]
        self._sides = tuple(
            RegressionMoments(regressors, self._width * len(STRENGTHS), name=site.name)
            for _ in ("train", "held out")
        )
        self._outputs = tuple(
            RegressionMoments(1, self._width, name=site.name) for _ in ("train", "held out")
        )
        self._corrected = False

    def add(
        self, place: Place, dense: Values, compressed: Values, inputs: Values, rows: RowChooser
    ) -> None:
        """Add one batch's tokens."""
        x = _value(place.read, compressed, inputs)
        y = _value(place.output, dense, inputs)
        flat = _rows(y)
        change = None
        if place.branch is not None and place.others:
            missing = torch.zeros_like(flat)
            for node in place.others:
                missing += _rows(_value(node, dense, inputs))
                missing -= _rows(_value(node, compressed, inputs))
            change = correction(flat, _rows(_value(place.branch, dense, inputs)), missing)
        if change is None:
            change = torch.zeros_like(flat)
        self._corrected = self._corrected or bool(change.any())
        own = rows_of(self._site, place.weights, _rows(x), flat)
        targets = torch.cat([own.target + strength * change for strength in STRENGTHS], -1)
        split = rows.split(place.site, x)
        for chosen, moments, outputs in zip(split, self._sides, self._outputs, strict=True):
            if chosen.numel():
                moments.observe(own.regressors[chosen], targets[chosen])
                outputs.observe(flat[chosen, :1], flat[chosen])  # only their variance is asked

    def fits(self, ridge: Ridge) -> list[Site]:
        """Return the site with a new map of every strength that differs."""
        strengths = STRENGTHS if self._corrected else STRENGTHS[:1]
        return [self._fit(number, strength, ridge) for number, strength in enumerate(strengths)]

    def _fit(self, number: int, strength: float, ridge: Ridge) -> Site:
        chosen = slice(number * self._width, (number + 1) * self._width)
        train, holdout = (moments.of_targets(chosen) for moments in self._sides)
        made = fit(self._site, train, holdout, ridge)
        facts = {"refit_strength": strength, "refit_ridge": made.ridge}
        site = with_map(self._site, made, facts)
        return replace(
            site, nmse=self._nmse(0, train, made), holdout_nmse=self._nmse(1, holdout, made)
        )

    def _nmse(self, side: int, moments: RegressionMoments, made: AffineMap) -> float:
        """Return the error against the target, relative to the variance of the dense output."""
        total = float(self._outputs[side].target_variance.sum()) if moments.count else 0.0
        if not total:
            return float("nan")
        return float(squared_errors(moments, made.weight, made.bias).sum()) / total


def _value(node: Node, values: Values, inputs: Values) -> Tensor:
    value = inputs[node.name] if node.op == "placeholder" else values[node.name]
    assert isinstance(value, Tensor)
    return value


def _rows(value: Tensor) -> Tensor:
    wide = value if value.dtype == torch.float64 else value.float()
    return wide.reshape(-1, value.shape[-1])


def _key(plan: Plan, inputs: Sequence[Mapping[str, Any]], options: tuple[object, ...]) -> str:
    """Return a digest of all that a run depends on."""
    state = hashlib.sha256(f"{plan.digest}{options}".encode())
    for batch in inputs:
        for name, value in sorted(batch.items()):
            state.update(name.encode())
            if isinstance(value, Tensor):
                raw = value.detach().cpu().contiguous().view(-1)
                state.update(f"{value.dtype}{tuple(value.shape)}".encode())
                state.update(raw.view(torch.uint8).numpy().tobytes() if raw.numel() else b"")
            else:
                state.update(repr(value).encode())
    return state.hexdigest()
