"""``nbl.calibrate``: text through an observing backend, then one solve a site."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from nbl_compiler.batches import Batch
from nbl_compiler.calibration_checks import check_request, check_tokens
from nbl_compiler.config import FFN, Attention, Config
from nbl_compiler.device_map import traceable
from nbl_compiler.distributed import merge_across_processes, plan_of_first_process
from nbl_compiler.errors import ConfigError
from nbl_compiler.ffn.fit import fit_ffns
from nbl_compiler.ffn.sites import FFNFit, FFNSite
from nbl_compiler.ffn.stages import NeuronStage, Stage
from nbl_compiler.fingerprint import Sketch, sketch
from nbl_compiler.fit_gates import gate_tokens, gates_of_sites
from nbl_compiler.held_back import all_but_last
from nbl_compiler.loss_ranking import rank_attention, rank_ffns
from nbl_compiler.observe import Observation
from nbl_compiler.plans import Plan, Site
from nbl_compiler.registry import attach
from nbl_compiler.select import Candidate, decide, decide_ffn, fit_sites, needs_trials
from nbl_compiler.several_processes import ALONE, Share, is_first_process
from nbl_compiler.tensor_parallel import work_of
from nbl_compiler.text_pass import (
    TracedModel,
    device_of,
    observe,
    observe_again,
    observe_weights,
)
from nbl_compiler.text_share import Text, text_of
from nbl_compiler.value_states import Gates


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    config: Config | None = None,
    *,
    whole_text: bool = False,
    progress: bool = True,
) -> Plan:
    """Calibrate a plan for a pretrained model and attach it to the model.

    The model runs over the batches, compiled by a backend that finds the sites with the same
    matchers as at compile time and keeps only second moments of what it sees: memory does not
    grow with the number of tokens. Attention takes one pass; FFNs take a second one, and more for
    guards, so the batches are gone through again (those of an iterator are kept for it).

    In a ``torch.distributed`` job every process passes its own batches, or all of them the same
    ones with ``whole_text``; the moments are summed, and all processes return the same plan. The
    processes that hold a tensor-parallel model together pass the same batches.

    Args:
        model: In eval mode, on any device, in float32, bfloat16 or float16.
        batches: Token ids [B, T], or mappings of model inputs. Tokens whose ``attention_mask``
            [B, T] is 0 never count.
        config: What to replace and how to fit.
        whole_text: In a job, every process was given all batches, and takes its share of them.
            The plan is then that of one process, up to the rounding of sums.
        progress: Show a progress bar with tokens, seconds and the estimated rest (in a job, in
            its first process).

    Returns:
        The plan. ``torch.compile(model, backend="nbl")`` will find it.

    Raises:
        InferenceOnlyError: if the model is in training mode.
        UnsupportedDtypeError: if the model computes in a dtype that has no linear maps here.
        CalibrationError: if there are too few tokens, NaN or infinite activations, or no site.
        ConfigError: if the configuration names sites that do not exist, or asks a tensor-parallel
            model for value states.
    """
    config = config or Config()
    calibrated = observe_model(model, batches, config, whole_text=whole_text, progress=progress)
    plan = calibrated.plan()
    attach(model, plan)
    return plan


@dataclass(frozen=True)
class Calibrated:
    """Everything that calibration found out, before any site is chosen.

    Args:
        observation: Moments of every attention site, and which FFN sites there are.
        candidates: The solved map of every attention site, in model order (empty if not asked
            for).
        fits: The fit of every FFN site, in model order.
        config: The configuration of the calibration.
        fingerprint: Sketches of the model's weights.
        model: What was calibrated, for people.
        device: Where the model's weights are.
    """

    observation: Observation
    candidates: tuple[Candidate, ...]
    fits: tuple[FFNFit, ...]
    config: Config
    fingerprint: tuple[Sketch, ...]
    model: str
    device: torch.device

    def plan(self, attention: Attention | None = None, ffn: FFN | None = None) -> Plan:
        """Return the plan for one choice of sites; nothing is solved again.

        Args:
            attention: How to choose attention sites; by default as calibrated. ``input`` must be
                what was observed.
            ffn: How to choose FFN sites, likewise; everything but ``count``, ``layers`` and
                ``max_nmse`` must be as calibrated.

        Raises:
            ConfigError: if sites are named that do not exist, or something was not observed.
        """
        config = replace(
            self.config, attention=attention or self.config.attention, ffn=ffn or self.config.ffn
        )
        _check_choice(self.config, config)
        sites: tuple[Site, ...] = ()
        if config.attention is not None:
            sites += decide(self.candidates, self.observation.rejected, config.attention)
        if config.ffn is not None and self.observation.ffn is not None:
            sites += decide_ffn(self.fits, self.observation.ffn.rejected, config.ffn)
        plan = Plan(sites, self.fingerprint, self.model, _plain(config))
        return plan_of_first_process(plan, self.device)


def _check_choice(observed: Config, wanted: Config) -> None:
    if wanted.attention is not None and (
        observed.attention is None or observed.attention.input != wanted.attention.input
    ):
        raise ConfigError(f"input={wanted.attention.input!r} was not observed; calibrate with it")
    if wanted.ffn is not None:
        same = observed.ffn and replace(
            observed.ffn,
            count=wanted.ffn.count,
            layers=wanted.ffn.layers,
            max_nmse=wanted.ffn.max_nmse,
        )
        if same != wanted.ffn:
            raise ConfigError("this form of folded FFNs was not fitted; calibrate with it")


def observe_model(
    model: nn.Module,
    batches: Iterable[Batch],
    config: Config | None = None,
    *,
    whole_text: bool = False,
    progress: bool = True,
    solve: bool = True,
) -> Calibrated:
    """Do all of ``calibrate`` but choose the sites: one calibration can serve several plans.

    Args:
        model: As for ``calibrate``, as are ``batches``, ``config``, ``whole_text`` and
            ``progress``.
        batches: See there.
        config: See there.
        whole_text: See there.
        progress: See there.
        solve: Solve the maps. Without, only the first pass's moments are taken.

    Raises:
        NBLError: As ``calibrate``.
    """
    config = config or Config()
    model = getattr(model, "_orig_mod", model)  # what torch.compile(model) was made of
    with traceable(model):
        return _observe_model(model, batches, config, whole_text, progress, solve)


def _observe_model(
    model: nn.Module,
    batches: Iterable[Batch],
    config: Config,
    whole_text: bool,
    progress: bool,
    solve: bool,
) -> Calibrated:
    aside: list[dict[str, Any]] = []
    if solve and any(map(needs_trials, (config.attention, config.ffn))):
        batches = all_but_last(model, batches, aside)
    (found,) = observe_forms(
        model, batches, config, (config.ffn,), whole_text=whole_text, progress=progress, solve=solve
    )
    progress = progress and is_first_process()
    share = work_of(model).batches if whole_text else ALONE
    candidates, fits, observation = found.candidates, found.fits, found.observation
    if candidates and aside and config.attention is not None:
        candidates = rank_attention(
            model, candidates, aside, config.attention, share=share, progress=progress
        )
    if fits and aside and config.ffn is not None and observation.ffn is not None:
        sites = observation.ffn.sites
        fits = rank_ffns(model, sites, fits, aside, config.ffn, share=share, progress=progress)
    return replace(found, candidates=candidates, fits=fits)


def observe_forms(
    model: nn.Module,
    batches: Iterable[Batch],
    config: Config,
    forms: Sequence[FFN | None],
    *,
    whole_text: bool = False,
    progress: bool = True,
    solve: bool = True,
) -> tuple[Calibrated, ...]:
    """Calibrate once and fit the FFNs in several forms, without trials.

    Args:
        model: As for ``calibrate``, as are ``batches``, ``config`` and ``progress``.
        batches: See there.
        config: See there; ``ffn`` says what the first pass has to look at.
        forms: What to fit. None fits no FFN.
        whole_text: See there.
        progress: See there.
        solve: Solve the maps. Without, only the first pass's moments are taken.

    Returns:
        One calibration a form; they share the attention maps.

    Raises:
        NBLError: As ``calibrate``.
    """
    if config.attention is None and config.ffn is None:
        raise ConfigError("the configuration leaves everything alone: nothing to calibrate")
    check_request(model)
    progress = progress and is_first_process()
    mixed = config.attention is not None and config.attention.mixed
    work, again = work_of(model), (config.ffn is not None and solve) or mixed
    text = text_of(batches, work.batches, shared=whole_text, again=again)
    traced = TracedModel(model)
    gates: dict[str, Gates] = {}
    first = text.with_recoded() if mixed else text
    if mixed:
        samples = observe_weights(
            traced, first.first(gate_tokens(model)), config, progress=progress
        )
        gates = gates_of_sites(samples, progress=progress)
    seen = observe(traced, first, config, rows=work.rows, gates=gates, progress=progress)
    observation = merge_across_processes(seen)
    check_tokens(observation)
    sketches = _sketches(model)
    positions = {known: i for i, known in enumerate(sketches)}
    for site in observation.sites.values():
        site.details["weights"] = [positions[w] for w in site.weights]
    candidates = fit_sites(observation, config, progress=progress) if solve else ()
    made = []
    for form in forms:
        own = replace(config, ffn=form)
        passes = _Passes(traced, text, own, work.rows, progress)
        fits = _fit_ffns(passes, observation, positions) if solve else ()
        made.append(
            Calibrated(
                observation, candidates, fits, own, sketches, _describe(model), device_of(model)
            )
        )
    return tuple(made)


@dataclass(frozen=True)
class _Passes:
    """Further passes over the text, for FFN sites."""

    model: TracedModel
    text: Text
    config: Config
    rows: Share
    progress: bool

    def __call__(self, stages: Mapping[str, Stage], tokens: int | None = None) -> None:
        """Let the stages see the text, or its first tokens, in all processes."""
        text = self.text if tokens is None else self.text.first(tokens)

        def begin(site: FFNSite) -> Stage | None:
            return stages.get(site.name)

        observe_again(self.model, text, self.config, begin, rows=self.rows, progress=self.progress)
        for stage in stages.values():
            stage.merge_across_processes()


def _fit_ffns(
    passes: _Passes, observation: Observation, positions: Mapping[Sketch, int]
) -> tuple[FFNFit, ...]:
    config = passes.config
    if config.ffn is None or observation.ffn is None:
        return ()
    first = {n: s for n, s in observation.ffn.stages.items() if isinstance(s, NeuronStage)}
    sites = observation.ffn.sites
    fits = fit_ffns(sites, first, config.ffn, config.ridge, passes)
    return tuple(
        replace(
            fit,
            details={**fit.details, "weights": [positions[w] for w in sites[fit.name].sketches]},
        )
        for fit in fits
    )


def _sketches(model: nn.Module) -> tuple[Sketch, ...]:
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    return tuple(dict.fromkeys(sketch(p) for p in parameters))


def _describe(model: nn.Module) -> str:
    size = sum(p.numel() for p in model.parameters())
    return f"{type(model).__name__} ({size / 1e6:.1f} M parameters)"


def _plain(config: Config) -> dict[str, Any]:
    values = asdict(config)
    for kind in ("attention", "ffn"):
        if values[kind] is not None and values[kind]["layers"] is not None:
            values[kind]["layers"] = list(values[kind]["layers"])
    return values
