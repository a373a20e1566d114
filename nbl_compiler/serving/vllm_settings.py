"""Which of vLLM's settings a plan cannot be served with. Runs before an engine starts."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed.utils import get_pp_indices
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from nbl_compiler.errors import ConfigError, PlanMismatchError
from nbl_compiler.plans import Plan
from nbl_compiler.serving.families import PLAN_FILE, SECTION, layer_of


class EngineSettings(VerifyAndUpdateConfig):
    """vLLM's hook for what an architecture asks of the configuration."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Raise unless the plan can be served so (see ``check_settings``)."""
        check_settings(vllm_config, load_plan(vllm_config))


def load_plan(vllm_config: VllmConfig) -> Plan:
    """Return the plan of an exported folder, or of a hub id.

    Raises:
        ConfigError: if the folder holds none.
        PlanFormatError: if it is truncated or edited.
        PlanMismatchError: if it is not the plan that ``config.json`` names.
    """
    from transformers.utils.hub import cached_file

    model = vllm_config.model_config
    section = getattr(model.hf_config, SECTION, None)
    try:
        path = cached_file(model.model, PLAN_FILE, revision=model.revision)
    except OSError as error:
        raise ConfigError(f"{model.model} holds no {PLAN_FILE}: {error}") from error
    with torch.device("cpu"):  # vLLM builds models with the accelerator as default
        plan = Plan.load(str(path))
    digest = section.get("digest") if isinstance(section, dict) else None
    if plan.digest != digest:
        raise PlanMismatchError(
            f"{path} is not the plan that config.json names ({str(digest)[:12]}…); export again"
        )
    return plan


def check_settings(vllm_config: VllmConfig, plan: Plan) -> None:
    """Raise unless the plan can be served with these settings.

    Raises:
        ConfigError: with the setting, the reason, and what to do.
    """
    if not plan.rewritten:
        return
    if vllm_config.lora_config is not None:
        raise ConfigError(
            "LoRA: an adapter's matrices for a replaced layer would have nothing to attach to; "
            "merge the adapter into the model, calibrate and export that"
        )
    model = vllm_config.model_config
    if model.quantization is not None:
        raise ConfigError(
            f"quantization={model.quantization!r}: the plan was calibrated on "
            "plain weights, and its errors hold for those; serve it without quantization"
        )
    if model.runner_type != "generate":
        raise ConfigError(
            f"runner={model.runner_type!r}: only text generation is served; "
            "pooling adapters load weights past the plan"
        )
    offload = vllm_config.offload_config
    if offload.uva.cpu_offload_gb > 0 or offload.prefetch.offload_group_size > 0:
        raise ConfigError(
            "weights offloaded to the CPU: the offloader takes hold of layers before the plan "
            "replaces parts of them; serve without it"
        )
    if vllm_config.parallel_config.tensor_parallel_size > 1:
        guarded = [site.name for site in plan.rewritten if site.guarded]
        if guarded:
            raise ConfigError(
                f"tensor parallel: the guard of {guarded[0]} picks a token's outliers among all "
                "neurons, which no process has; serve it in one, or calibrate with guard='off'"
            )
    _check_stages(vllm_config, plan)


def _check_stages(vllm_config: VllmConfig, plan: Plan) -> None:
    """Raise if a pipeline stage has no attention layer left: it could not size its cache."""
    config: Any = vllm_config.model_config.hf_text_config
    layers = config.num_hidden_layers
    stages = vllm_config.parallel_config.pipeline_parallel_size
    linearized = {layer_of(site) for site in plan.rewritten if site.kind == "attention"}
    for stage in range(stages):
        own = range(*get_pp_indices(layers, stage, stages))
        if all(layer in linearized for layer in own):
            raise ConfigError(
                f"pipeline stage {stage} of {stages} (layers {own.start} to {own.stop - 1}) has "
                "no attention layer left, so vLLM cannot size its cache; take fewer stages, divide "
                "the layers otherwise (VLLM_PP_LAYER_PARTITION), or leave one of these dense"
            )
