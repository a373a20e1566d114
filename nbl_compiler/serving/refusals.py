"""What cannot be served, each with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nbl_compiler.errors import ConfigError, PlanMismatchError
from nbl_compiler.passes.fold_ffn import check_folded_shapes
from nbl_compiler.passes.rewrite_sites import check_shapes
from nbl_compiler.plans import Plan, Site
from nbl_compiler.serving.families import VLLM_MODULES, layer_of
from nbl_compiler.value_states import states_of


def check_servable(config: Mapping[str, Any], plan: Plan) -> None:
    """Raise unless vLLM can serve the plan in a model of this configuration.

    Args:
        config: The model's ``config.json``.
        plan: The plan.

    Raises:
        ConfigError: naming the site or setting that stands against it.
        PlanMismatchError: if a site is not one of this model.
    """
    _check_model(config)
    config = {**_defaults(config), **config}
    for site in plan.rewritten:
        _check_place(site, config)
        (_check_attention if site.kind == "attention" else _check_ffn)(site, config)
    linearized = sum(site.kind == "attention" for site in plan.rewritten)
    if linearized == config["num_hidden_layers"]:
        raise ConfigError(
            "the plan linearizes every attention layer; vLLM sizes its cache and schedules by at "
            "least one: leave one dense (nbl.Attention(count=...))"
        )


def _check_model(config: Mapping[str, Any]) -> None:
    architecture = (config.get("architectures") or ["unknown"])[0]
    if architecture not in VLLM_MODULES:
        raise ConfigError(
            f"models of the class {architecture} are not served; {', '.join(VLLM_MODULES)} are"
        )
    if config.get("quantization_config"):
        raise ConfigError(
            "the model's weights are quantized; a plan is calibrated on, and copies rows of, plain "
            "weights: export the model that was calibrated"
        )
    if config.get("num_kv_shared_layers"):
        raise ConfigError(
            f"the last {config['num_kv_shared_layers']} layers of this model read the keys and "
            "values of earlier ones, which a linearized layer does not have"
        )


def _defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a ``config.json`` of this type leaves out."""
    from transformers import CONFIG_MAPPING

    kind = str(config.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise ConfigError(f"this transformers knows no models of the type {kind!r}; update it")
    return dict(CONFIG_MAPPING[kind]().to_dict())


def _check_place(site: Site, config: Mapping[str, Any]) -> None:
    layer = layer_of(site)
    if layer is None or layer >= config["num_hidden_layers"]:
        raise PlanMismatchError(
            f"the plan's site {site.name!r} is no {site.kind} of this model's "
            f"{config['num_hidden_layers']} layers; calibrate this model as transformers loads it"
        )


def _check_attention(site: Site, config: Mapping[str, Any]) -> None:
    if states_of(site.details):
        raise ConfigError(
            f"{site.name} reads value states, which vLLM would have to keep like the states of a "
            "recurrent layer; only maps without memory are served: calibrate without taps and "
            "mixed values"
        )
    width = config["hidden_size"]
    check_shapes(site, {"weight": (width, width), "bias": (width,)})


def _check_ffn(site: Site, config: Mapping[str, Any]) -> None:
    width, neurons = config["hidden_size"], config["intermediate_size"]
    if not site.details["gated"] or site.details["neurons"] != neurons:
        raise PlanMismatchError(
            f"the plan's {site.name} is no gated FFN of {neurons} neurons; calibrate this model"
        )
    check_folded_shapes(site, width, width)
