"""vLLM's own models with a plan put in, one class for each architecture that is served.

The plan is applied to modules, after the model is built and before its weights load. Rewriting
vLLM's FX graphs would come too late: the KV cache is sized by the attention modules that there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.models.gemma2 import Gemma2ForCausalLM
from vllm.model_executor.models.gemma3 import Gemma3ForCausalLM
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from nbl_compiler.errors import PlanFormatError
from nbl_compiler.plans import Site
from nbl_compiler.serving.plan_weights import PlanWeights, reads_residual
from nbl_compiler.serving.vllm_guarded import GuardedFFNLayer
from nbl_compiler.serving.vllm_layers import FoldedFFN, LinearAttention, StreamInFront
from nbl_compiler.serving.vllm_settings import check_settings, load_plan


class _Planned:
    """Puts the plan of the model's folder into one of vLLM's causal language models."""

    model: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        plan = load_plan(vllm_config)
        check_settings(vllm_config, plan)
        self._nbl_config = vllm_config
        self._nbl_stage = range(self.model.start_layer, self.model.end_layer)
        self._nbl_weights: PlanWeights | None = PlanWeights(plan, self._nbl_stage)
        self._nbl_replaced = [
            *self._replace(self._nbl_weights.attention, "self_attn", _linear_attention),
            *self._replace(self._nbl_weights.ffn, "mlp", _folded_ffn),
        ]

    def _replace(
        self,
        sites: Mapping[int, Site],
        part: str,
        make: Callable[[nn.Module, int, Site, str], nn.Module],
    ) -> Iterator[str]:
        """Replace a part of some layers; return the new modules' paths."""
        caches = self._nbl_config.compilation_config.static_forward_context
        for index, site in sites.items():
            layer, path = self.model.layers[index], f"model.layers.{index}.{part}"
            gone = set(getattr(layer, part).modules())
            for name in [name for name, module in caches.items() if module in gone]:
                del caches[name]  # or it would get a KV cache that nobody reads
            setattr(layer, part, make(layer, self.model.config.hidden_size, site, path))
            yield path

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load what the layers read of the checkpoint, and the plan.

        Raises:
            PlanFormatError: if something that the plan brings in, or needs, was not there.
        """
        plan = self._nbl_weights or PlanWeights(load_plan(self._nbl_config), self._nbl_stage)
        self._nbl_weights = None  # a second copy of the maps; read again if weights are reloaded
        processes = get_tensor_model_parallel_world_size()
        fed = plan.through(weights, multiple_of=processes)
        loaded: set[str] = super().load_weights(fed)  # type: ignore[misc]
        # vLLM reports no linear layer whose weights were missing.
        missing = plan.missing()
        for path in self._nbl_replaced:
            module = cast(nn.Module, self).get_submodule(path)
            names = {f"{path}.{name}" for name, _ in module.named_parameters()}
            missing += sorted(names - loaded)
        if missing:
            raise PlanFormatError(
                f"{', '.join(missing[:4])} did not get loaded; the folder lacks weights that the "
                "plan needs: export it again"
            )
        for index, site in plan.ffn.items():
            if site.guarded:
                self.model.layers[index].mlp.apply_plan(site)
        return loaded


def _linear_attention(layer: nn.Module, width: int, site: Site, path: str) -> nn.Module:
    if reads_residual(site):
        layer.input_layernorm = StreamInFront()
    return LinearAttention(width, path)


def _folded_ffn(layer: nn.Module, width: int, site: Site, path: str) -> nn.Module:
    old: Any = layer.mlp
    if site.guarded:
        return GuardedFFNLayer(old.gate_up_proj, old.down_proj, site)
    return FoldedFFN(width, site, old.act_fn, old.gate_up_proj.bias is not None, path)


class NBLLlamaForCausalLM(_Planned, LlamaForCausalLM):
    """Llama with a plan."""


class NBLMistralForCausalLM(_Planned, MistralForCausalLM):
    """Mistral with a plan."""


class NBLQwen2ForCausalLM(_Planned, Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5 with a plan."""


class NBLQwen3ForCausalLM(_Planned, Qwen3ForCausalLM):
    """Qwen3 with a plan."""


class NBLGemma2ForCausalLM(_Planned, Gemma2ForCausalLM):
    """Gemma 2 with a plan."""


class NBLGemma3ForCausalLM(_Planned, Gemma3ForCausalLM):
    """Gemma 3 (text) with a plan."""
