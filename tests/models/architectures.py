"""Tiny random configurations of the real transformers classes.

For structure and numerics only: their weights are random, so they say nothing about quality.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import nn

HIDDEN, LAYERS, HEADS, FFN_WIDTH, VOCABULARY, POSITIONS = 32, 3, 4, 48, 64, 128
SLIDING_WINDOW = 8

Builder = Callable[[int], nn.Module]  # number of layers → model

_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN_WIDTH,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
    **_SPECIAL,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Architecture:
    """One family.

    Args:
        name: Name in test ids.
        build: Makes a model with the given number of layers (seeded by ``make``).
        sites: Number of attention sites that match without a cache, with ``LAYERS`` layers.
        rejected: Substring of the reason → number of sites rejected with it, likewise.
        kind: ``"decoder"``, ``"encoder"``, ``"vision"`` or ``"encoder-decoder"``.
        attention: Paths of the self-attention modules, ``{}`` for the layer's index.
        cross_attention: Path of the cross-attention modules, or an empty string.
        implementations: Spellings of attention that transformers offers for the family.
    """

    name: str
    build: Builder
    sites: int = LAYERS
    rejected: dict[str, int] = field(default_factory=dict)
    kind: str = "decoder"
    attention: tuple[str, ...] = ("model.layers.{}.self_attn",)
    cross_attention: str = ""
    implementations: tuple[str, ...] = ("sdpa", "eager")

    def site_names(self, layers: int = LAYERS) -> list[str]:
        """Return the names of the sites that match, in model order."""
        return [path.format(i) for path in self.attention for i in range(layers)]


def _model(
    config: str,
    model: str,
    base: dict[str, Any] = _GROUPED,
    depth: str = "num_hidden_layers",
    **extra: Any,
) -> Builder:
    def build(layers: int) -> nn.Module:
        options = {**base, **extra, depth: layers}
        # Options that hold one entry a layer are given as functions of the number of layers.
        options = {k: v(layers) if callable(v) else v for k, v in options.items()}
        return getattr(hf, model)(getattr(hf, config)(**options))

    return build


def _causal(name: str, stem: str, base: dict[str, Any] = _GROUPED, **extra: Any) -> Architecture:
    """A family whose layout follows Llama's."""
    return Architecture(name, _model(f"{stem}Config", f"{stem}ForCausalLM", base, **extra))


def _alternating(layers: int) -> list[str]:
    return ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]


_GEMMA = {
    **_GROUPED,
    "head_dim": 8,
    "sliding_window": SLIDING_WINDOW,
    "query_pre_attn_scalar": 8,
    "layer_types": _alternating,
}
_GPT = {
    "vocab_size": VOCABULARY,
    "n_embd": HIDDEN,
    "n_head": HEADS,
    "n_positions": POSITIONS,
    **_SPECIAL,
}
_LATENT = {
    **_COMMON,
    "num_key_value_heads": HEADS,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
_DISTILBERT = {
    "vocab_size": VOCABULARY,
    "dim": HIDDEN,
    "n_heads": HEADS,
    "hidden_dim": FFN_WIDTH,
    "max_position_embeddings": POSITIONS,
}
_VIT = {
    "hidden_size": HIDDEN,
    "intermediate_size": FFN_WIDTH,
    "num_attention_heads": HEADS,
    "image_size": 16,
    "patch_size": 4,
}
_WHISPER = {
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "encoder_layers": lambda layers: layers,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": FFN_WIDTH,
    "decoder_ffn_dim": FFN_WIDTH,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "max_target_positions": POSITIONS,
    "decoder_start_token_id": 1,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    **_SPECIAL,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "d_kv": 8,
    "d_ff": FFN_WIDTH,
    "num_heads": HEADS,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
}

ARCHITECTURES = (
    _causal("llama", "Llama"),
    _causal("mistral", "Mistral", sliding_window=SLIDING_WINDOW),
    _causal("qwen2", "Qwen2"),
    _causal("qwen3", "Qwen3", head_dim=8),
    Architecture(
        "gemma2", _model("Gemma2Config", "Gemma2ForCausalLM", _GEMMA), implementations=("eager",)
    ),
    Architecture("gemma3", _model("Gemma3TextConfig", "Gemma3ForCausalLM", _GEMMA)),
    _causal("phi", "Phi", partial_rotary_factor=0.5),
    _causal("phi3", "Phi3"),
    Architecture(
        "gpt2",
        _model("GPT2Config", "GPT2LMHeadModel", _GPT, "n_layer"),
        attention=("transformer.h.{}.attn",),
    ),
    Architecture(
        "gpt_neox",
        _model("GPTNeoXConfig", "GPTNeoXForCausalLM", _COMMON, rotary_pct=0.5),
        attention=("gpt_neox.layers.{}.attention",),
    ),
    Architecture(
        "gptj",
        _model("GPTJConfig", "GPTJForCausalLM", _GPT, "n_layer", rotary_dim=4),
        attention=("transformer.h.{}.attn",),
    ),
    Architecture(
        "opt",
        _model(
            "OPTConfig", "OPTForCausalLM", _COMMON, ffn_dim=FFN_WIDTH, word_embed_proj_dim=HIDDEN
        ),
        attention=("model.decoder.layers.{}.self_attn",),
    ),
    Architecture(
        "falcon",
        _model(
            "FalconConfig",
            "FalconForCausalLM",
            _COMMON,
            multi_query=True,
            parallel_attn=True,
            new_decoder_architecture=False,
            bias=False,
            alibi=False,
        ),
        attention=("transformer.h.{}.self_attention",),
    ),
    Architecture(
        "bloom",
        _model("BloomConfig", "BloomForCausalLM", {**_COMMON, "n_head": HEADS}, "n_layer"),
        attention=("transformer.h.{}.self_attention",),
    ),
    _causal("starcoder2", "Starcoder2"),
    _causal("smollm3", "SmolLM3"),
    _causal("olmo2", "Olmo2"),
    _causal("cohere", "Cohere"),
    _causal("deepseek_v3", "DeepseekV3", _LATENT),
    _causal("mixtral", "Mixtral", num_local_experts=4, num_experts_per_tok=2),
    Architecture(
        "bert",
        _model("BertConfig", "BertModel", _COMMON),
        kind="encoder",
        attention=("encoder.layer.{}.attention",),
    ),
    Architecture(
        "roberta",
        _model(
            "RobertaConfig",
            "RobertaModel",
            {**_COMMON, "pad_token_id": 1, "max_position_embeddings": POSITIONS + 2},
        ),
        kind="encoder",
        attention=("encoder.layer.{}.attention",),
    ),
    Architecture(
        "distilbert",
        _model("DistilBertConfig", "DistilBertModel", _DISTILBERT, "n_layers"),
        kind="encoder",
        attention=("transformer.layer.{}.attention",),
    ),
    Architecture(
        "modernbert",
        _model(
            "ModernBertConfig",
            "ModernBertModel",
            _COMMON,
            local_attention=16,
            cls_token_id=3,
            sep_token_id=4,
        ),
        kind="encoder",
        attention=("layers.{}.attn",),
    ),
    Architecture(
        "vit",
        _model("ViTConfig", "ViTModel", _VIT),
        kind="vision",
        attention=("layers.{}.attention",),
    ),
    Architecture(
        "whisper",
        _model("WhisperConfig", "WhisperForConditionalGeneration", _WHISPER, "decoder_layers"),
        sites=2 * LAYERS,
        rejected={"cross-attention": LAYERS},
        kind="encoder-decoder",
        attention=("model.encoder.layers.{}.self_attn", "model.decoder.layers.{}.self_attn"),
        cross_attention="model.decoder.layers.{}.encoder_attn",
    ),
    Architecture(
        "t5",
        _model("T5Config", "T5ForConditionalGeneration", _T5, "num_layers"),
        sites=2 * LAYERS,
        rejected={"cross-attention": LAYERS},
        kind="encoder-decoder",
        attention=(
            "encoder.block.{}.layer.0.SelfAttention",
            "decoder.block.{}.layer.0.SelfAttention",
        ),
        cross_attention="decoder.block.{}.layer.1.EncDecAttention",
    ),
)
BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}


def make(
    name: str, implementation: str | None = None, seed: int = 0, layers: int = LAYERS
) -> nn.Module:
    """Build a tiny model of the family with seeded random weights, in eval mode."""
    torch.manual_seed(seed)
    model = BY_NAME[name].build(layers).eval()
    model.set_attn_implementation(implementation or BY_NAME[name].implementations[0])
    return model


def inputs(name: str, batch: int = 2, length: int = 12, seed: int = 1) -> dict[str, torch.Tensor]:
    """Return model inputs for the family, without padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (batch, length), generator=generator)
    kind = BY_NAME[name].kind
    if kind == "vision":
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
    if name == "whisper":
        return {
            "input_features": torch.randn(batch, 8, 32, generator=generator),
            "decoder_input_ids": ids,
        }
    if kind == "encoder-decoder":
        return {"input_ids": ids, "decoder_input_ids": ids[:, :7]}
    return {"input_ids": ids}
