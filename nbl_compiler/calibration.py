"""``nbl.calibrate``: one pass over text through an observing backend, then one solve a site."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch._dynamo
from torch import nn

from nbl_compiler.batches import Batch, cheap_arguments, model_inputs
from nbl_compiler.config import Attention, Config
from nbl_compiler.distributed import fail_together, merge_across_processes, plan_of_first_process
from nbl_compiler.errors import (
    CalibrationError,
    ConfigError,
    InferenceOnlyError,
    NBLError,
    UnsupportedDtypeError,
)
from nbl_compiler.fingerprint import Sketch, sketch
from nbl_compiler.loss_ranking import rank_by_loss
from nbl_compiler.observe import Observation, Observer
from nbl_compiler.passes.linearize_attention import SUPPORTED_DTYPES
from nbl_compiler.plan import Plan
from nbl_compiler.progress import token_bar
from nbl_compiler.registry import attach
from nbl_compiler.select import Candidate, check_selection, decide, fit_sites

# Below this many rows no map is worth solving; up to a few times the width, cross-validation and
# the ridge still find a usable one.
MIN_TOKENS = 16


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    config: Config | None = None,
    *,
    progress: bool = True,
) -> Plan:
    """Calibrate a plan for a pretrained model and attach it to the model.

    The model runs once over the batches, compiled by a backend that finds the sites with the same
    matchers as at compile time and keeps only second moments of what it sees: memory does not
    grow with the number of tokens. In a ``torch.distributed`` job every process passes its own
    batches; the moments are summed, and all processes return the same plan.

    Args:
        model: In eval mode, on any device, in float32, bfloat16 or float16.
        batches: Token ids [B, T], or mappings of model inputs. Tokens whose ``attention_mask``
            [B, T] is 0 never count.
        config: What to replace and how to fit.
        progress: Show a progress bar with tokens, seconds and the estimated rest.

    Returns:
        The plan. ``torch.compile(model, backend="nbl")`` will find it.

    Raises:
        InferenceOnlyError: if the model is in training mode.
        UnsupportedDtypeError: if the model computes in a dtype that has no linear maps here.
        CalibrationError: if there are too few tokens, NaN or infinite activations, or no site.
        ConfigError: if the configuration names sites that do not exist.
    """
    config = config or Config()
    calibrated = observe_model(model, batches, config, progress=progress)
    plan = calibrated.plan(_attention(config))
    attach(model, plan)
    return plan


@dataclass(frozen=True)
class Calibrated:
    """Everything that one pass over the text found out, before any site is chosen.

    Args:
        observation: Moments of every site.
        candidates: The solved map of every site, in model order (empty if not asked for).
        config: The configuration of the pass.
        fingerprint: Sketches of the model's weights.
        model: What was calibrated, for people.
        device: Where the model's weights are.
    """

    observation: Observation
    candidates: tuple[Candidate, ...]
    config: Config
    fingerprint: tuple[Sketch, ...]
    model: str
    device: torch.device

    def plan(self, attention: Attention) -> Plan:
        """Return the plan for one choice of sites; the maps are not solved again.

        Args:
            attention: How to choose. ``input`` must be what was observed.

        Raises:
            ConfigError: if sites are named that do not exist, or another input is asked for.
        """
        if attention.input != _attention(self.config).input:
            raise ConfigError(f"input={attention.input!r} was not observed; calibrate with it")
        plan = Plan(
            sites=decide(self.candidates, self.observation.rejected, attention),
            fingerprint=self.fingerprint,
            model=self.model,
            config=_plain(replace(self.config, attention=attention)),
        )
        return plan_of_first_process(plan, self.device)


def observe_model(
    model: nn.Module,
    batches: Iterable[Batch],
    config: Config | None = None,
    *,
    progress: bool = True,
    solve: bool = True,
) -> Calibrated:
    """Do all of ``calibrate`` but choose the sites: one pass can serve several plans.

    Args:
        model: As for ``calibrate``, as are ``batches``, ``config`` and ``progress``.
        batches: See there.
        config: See there.
        progress: See there.
        solve: Solve the maps. Without, only the moments are taken.

    Raises:
        NBLError: As ``calibrate``.
    """
    config = config or Config()
    model = getattr(model, "_orig_mod", model)  # what torch.compile(model) was made of
    _check_request(model, config)
    aside: list[dict[str, Any]] = []
    if _attention(config).rank_by == "loss":
        batches = _all_but_last(model, batches, aside)
    observation = merge_across_processes(_observe(model, batches, config, progress))
    _check_tokens(observation)
    sketches = _sketches(model)
    positions = {known: i for i, known in enumerate(sketches)}
    for site in observation.sites.values():
        site.details["weights"] = [positions[w] for w in site.weights]
    candidates = fit_sites(observation, config, progress=progress) if solve else ()
    if candidates and aside:
        candidates = rank_by_loss(model, candidates, aside, _attention(config), progress=progress)
    return Calibrated(observation, candidates, config, sketches, _describe(model), _device(model))


def _attention(config: Config) -> Attention:
    if config.attention is None:
        raise ConfigError("the configuration leaves attention alone: nothing to calibrate")
    return config.attention


def _check_request(model: nn.Module, config: Config) -> None:
    _attention(config)
    if any(module.training for module in (model, *_dropouts(model))):
        raise InferenceOnlyError("the model is in training mode; call model.eval() first")
    for name, weight in model.named_parameters():
        computes = weight.is_floating_point() or weight.is_complex()
        if computes and weight.dtype not in SUPPORTED_DTYPES:
            raise UnsupportedDtypeError(
                f"{name} is stored in {weight.dtype}; load the model in float32, bfloat16 or "
                "float16 to calibrate it"
            )


def _dropouts(model: nn.Module) -> list[nn.Module]:
    kind = nn.modules.dropout._DropoutNd
    return [module for module in model.modules() if isinstance(module, kind) and module.p > 0]


def _observe(
    model: nn.Module, batches: Iterable[Batch], config: Config, progress: bool
) -> Observation:
    """Run the model over the batches; if that fails, it fails in every process."""
    observer = Observer(config)
    error = None
    try:
        _run(model, batches, observer, _attention(config), progress)
        observation = observer.finish()
    except NBLError as failure:
        error = failure
    finally:
        observer.release()
    fail_together(error)
    return observation


def _run(
    model: nn.Module,
    batches: Iterable[Batch],
    observer: Observer,
    attention: Attention,
    progress: bool,
) -> None:
    compiled = torch.compile(_private_forward(model), backend=observer.backend, dynamic=None)
    cheap = cheap_arguments(model)
    device = _device(model)
    total = len(batches) if hasattr(batches, "__len__") else None  # type: ignore[arg-type]
    with torch.no_grad(), _many_shapes(), token_bar(total, "calibrating", progress) as advance:
        for number, batch in enumerate(batches):
            inputs = model_inputs(model, batch, device)
            observer.start_batch(inputs)
            compiled(**{**cheap, **inputs})
            if number == 0 and observer.site_names:
                check_selection(observer.site_names, attention)  # not after the last batch
            advance(observer.batch_tokens)


def _all_but_last(
    model: nn.Module, batches: Iterable[Batch], aside: list[dict[str, Any]]
) -> Iterator[Batch]:
    """Yield the batches but the last, which goes ``aside``; a single batch serves both ends."""
    previous: Batch | None = None
    count = 0
    for batch in batches:
        if previous is not None:
            yield previous
        previous, count = batch, count + 1
    if previous is not None:
        aside.append(model_inputs(model, previous, _device(model)))
        if count == 1:
            yield previous


def _private_forward(model: nn.Module) -> Callable[..., Any]:
    """Return a function with a code object of its own, which runs the model.

    Dynamo keeps compiled code with the code object of what it compiled. Kept with the model's
    ``forward``, the graphs of calibration would outlive it, and would count towards the limit
    after which Dynamo no longer compiles that method.
    """

    def forward(**inputs: Any) -> Any:
        return model(**inputs)

    forward.__code__ = forward.__code__.replace(co_name="nbl_calibration")
    return forward


def _many_shapes() -> Any:
    """Allow one compiled graph a batch shape: text comes in many lengths."""
    return torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=4096)


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _check_tokens(observation: Observation) -> None:
    if not observation.sites and not observation.rejected:
        raise CalibrationError(
            "no attention site was seen: were there any batches, and is this a transformer?"
        )
    for name, site in observation.sites.items():
        if site.train.count < MIN_TOKENS:
            raise CalibrationError(
                f"{name} saw {site.train.count} calibration tokens; give at least {MIN_TOKENS} "
                "(tens of thousands for a good fit)"
            )


def _sketches(model: nn.Module) -> tuple[Sketch, ...]:
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    return tuple(dict.fromkeys(sketch(p) for p in parameters))


def _describe(model: nn.Module) -> str:
    size = sum(p.numel() for p in model.parameters())
    return f"{type(model).__name__} ({size / 1e6:.1f} M parameters)"


def _plain(config: Config) -> dict[str, Any]:
    values = asdict(config)
    attention = values["attention"]
    if attention is not None and attention["layers"] is not None:
        attention["layers"] = list(attention["layers"])
    return values
