"""What vLLM calls in each of its processes (entry point ``vllm.general_plugins``)."""

from __future__ import annotations

from nbl_compiler.serving.families import VLLM_MODULES, served_name

_MODELS = "nbl_compiler.serving.vllm_models"


def register() -> None:
    """Tell vLLM of the exported architectures; further calls do nothing.

    The classes are named, not imported: importing vLLM's models starts CUDA, which must not happen
    before worker processes are forked.
    """
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from nbl_compiler.serving.vllm_settings import EngineSettings

    for architecture in VLLM_MODULES:
        name = served_name(architecture)
        if name not in MODELS_CONFIG_MAP:
            ModelRegistry.register_model(name, f"{_MODELS}:{name}")
            MODELS_CONFIG_MAP[name] = EngineSettings
