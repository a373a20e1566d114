"""``nbl.calibrate``: one pass over text through an observing backend, then one solve a site."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

from nbl_compiler.config import Config
from nbl_compiler.distributed import merge_across_processes
from nbl_compiler.errors import CalibrationError, ConfigError, InferenceOnlyError
from nbl_compiler.fingerprint import sketch
from nbl_compiler.observe import Observation, Observer
from nbl_compiler.plan import Plan
from nbl_compiler.registry import attach
from nbl_compiler.select import decide

Batch = Tensor | Mapping[str, Any]

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
        batches: Token ids [B, T], or mappings of model inputs. Tokens whose ``attention_mask`` is
            0 never count.
        config: What to replace and how to fit.
        progress: Show a progress bar with tokens, seconds and the estimated rest.

    Returns:
        The plan. ``torch.compile(model, backend="nbl")`` will find it.

    Raises:
        InferenceOnlyError: if the model is in training mode.
        CalibrationError: if there are too few tokens, NaN or infinite activations, or no site.
        ConfigError: if the configuration names sites that do not exist.
    """
    config = config or Config()
    if model.training:
        raise InferenceOnlyError("the model is in training mode; call model.eval() first")
    if config.attention is None:
        raise ConfigError("the configuration leaves attention alone: nothing to calibrate")
    observer = Observer(config)
    _run(model, batches, observer, progress)
    observation = merge_across_processes(observer.finish())
    _check(observation)
    sites = decide(observation, config, progress=progress)
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    plan = Plan(
        sites=sites,
        fingerprint=tuple(dict.fromkeys(sketch(p) for p in parameters)),
        model=_describe(model),
        config=_plain(config),
    )
    attach(model, plan)
    return plan


def _run(model: nn.Module, batches: Iterable[Batch], observer: Observer, progress: bool) -> None:
    from nbl_compiler.progress import token_bar

    extra = _cheap_arguments(model)
    compiled = torch.compile(model, backend=observer.backend, dynamic=None)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    total = len(batches) if hasattr(batches, "__len__") else None  # type: ignore[arg-type]
    with torch.no_grad(), _many_shapes(), token_bar(total, "calibrating", progress) as bar:
        for batch in batches:
            inputs = _to_inputs(model, batch, device)
            tokens = observer.start_batch(inputs)
            compiled(**inputs, **{k: v for k, v in extra.items() if k not in inputs})
            bar(tokens)


def _many_shapes() -> Any:
    """Allow one compiled graph a batch shape: text comes in many lengths."""
    return torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=4096)


def _cheap_arguments(model: nn.Module) -> dict[str, Any]:
    """Return arguments that spare work no site needs: the LM head on all positions, the cache."""
    accepted = inspect.signature(model.forward).parameters
    extra: dict[str, Any] = {}
    if "logits_to_keep" in accepted:
        extra["logits_to_keep"] = 1
    if "use_cache" in accepted:
        extra["use_cache"] = False
    return extra


def _to_inputs(model: nn.Module, batch: Batch, device: torch.device) -> dict[str, Any]:
    if isinstance(batch, Tensor):
        name = getattr(model, "main_input_name", "input_ids")
        batch = {name: batch}
    if not isinstance(batch, Mapping):
        raise CalibrationError(
            f"a batch is a tensor of token ids or a mapping of model inputs, not {type(batch).__name__}"
        )
    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    inputs.pop("labels", None)
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if encoder_decoder and "decoder_input_ids" not in inputs and "input_ids" in inputs:
        # The decoder needs text as well; the shifted input is what teacher forcing would feed it.
        inputs["decoder_input_ids"] = inputs["input_ids"]
        if "attention_mask" in inputs:
            inputs["decoder_attention_mask"] = inputs["attention_mask"]
    return inputs


def _check(observation: Observation) -> None:
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


def _describe(model: nn.Module) -> str:
    size = sum(p.numel() for p in model.parameters())
    return f"{type(model).__name__} ({size / 1e6:.1f} M parameters)"


def _plain(config: Config) -> dict[str, Any]:
    values = asdict(config)
    attention = values["attention"]
    if attention is not None and attention["layers"] is not None:
        attention["layers"] = list(attention["layers"])
    return values
