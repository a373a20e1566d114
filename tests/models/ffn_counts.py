"""The FFN sites of every architecture in ``architectures.py``, with two layers."""

from __future__ import annotations

from dataclasses import dataclass

FFN_LAYERS = 2


@dataclass(frozen=True)
class FFNs:
    """What the matcher must find in one architecture.

    Args:
        sites: Names of the sites, in model order.
        activation: Of every site.
        gated: Whether the sites are gated.
        fused: Whether one projection computes gate and up.
        transposed: Whether weights are stored as [in, out].
        experts: Names of the routed experts, which are rejected.
        whole_layers: Whether a site's linears lie directly in the layer, together with attention.
    """

    sites: tuple[str, ...]
    activation: str
    gated: bool = False
    fused: bool = False
    transposed: bool = False
    experts: tuple[str, ...] = ()
    whole_layers: bool = False

    @property
    def weights(self) -> int | None:
        """Number of parameters of a gated site (all of these have no biases)."""
        return (2 if self.fused else 3) if self.gated else None


def _each(*paths: str) -> tuple[str, ...]:
    return tuple(path.format(i) for path in paths for i in range(FFN_LAYERS))


_LLAMA = FFNs(_each("model.layers.{}.mlp"), "silu", gated=True)
_GEMMA = FFNs(_each("model.layers.{}.mlp"), "gelu_tanh", gated=True)
_BERT = FFNs(_each("encoder.layer.{}"), "gelu", whole_layers=True)

EXPECTED = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "phi": FFNs(_each("model.layers.{}.mlp"), "gelu_tanh"),
    "phi3": FFNs(_each("model.layers.{}.mlp"), "silu", gated=True, fused=True),
    "gpt2": FFNs(_each("transformer.h.{}.mlp"), "gelu_tanh", transposed=True),
    "gpt_neox": FFNs(_each("gpt_neox.layers.{}.mlp"), "gelu"),
    "gptj": FFNs(_each("transformer.h.{}.mlp"), "gelu_tanh"),
    "opt": FFNs(_each("model.decoder.layers.{}"), "relu", whole_layers=True),
    "falcon": FFNs(_each("transformer.h.{}.mlp"), "gelu"),
    "bloom": FFNs(_each("transformer.h.{}.mlp"), "gelu_tanh"),
    "starcoder2": FFNs(_each("model.layers.{}.mlp"), "gelu_tanh"),
    "smollm3": _LLAMA,
    "olmo2": _LLAMA,
    "cohere": _LLAMA,
    "deepseek_v3": FFNs(
        ("model.layers.0.mlp", "model.layers.1.mlp.shared_experts"),
        "silu",
        gated=True,
        experts=("model.layers.1.mlp.experts",),
    ),
    "mixtral": FFNs((), "silu", experts=_each("model.layers.{}.mlp.experts")),
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": FFNs(_each("transformer.layer.{}.ffn"), "gelu"),
    "modernbert": FFNs(_each("layers.{}.mlp"), "gelu", gated=True, fused=True),
    "vit": FFNs(_each("layers.{}.mlp"), "gelu"),
    "whisper": FFNs(
        _each("model.encoder.layers.{}", "model.decoder.layers.{}"), "gelu", whole_layers=True
    ),
    "t5": FFNs(
        _each("encoder.block.{}.layer.1.DenseReluDense", "decoder.block.{}.layer.2.DenseReluDense"),
        "relu",
    ),
}
