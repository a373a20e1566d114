"""Tiny random configurations of the real transformers classes.

For structure and numerics only: their weights are random, so they say nothing about quality.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import transformers as hf
from torch import nn

HIDDEN, LAYERS, HEADS, FFN_WIDTH, VOCABULARY, POSITIONS = 32, 3, 4, 48, 64, 128

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN_WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Architecture:
    """One family.

    Args:
        name: Name in test ids.
        build: Makes the model in eval mode (seeded by ``make``).
        sites: Number of attention sites that match without a cache.
        rejected: Substring of the reason → number of sites rejected with it.
        kind: ``"decoder"``, ``"encoder"``, ``"vision"`` or ``"encoder-decoder"``.
        tolerance: Absolute tolerance for logits, where a family's scale needs its own.
    """

    name: str
    build: Callable[[], nn.Module]
    sites: int = LAYERS
    rejected: dict[str, int] = field(default_factory=dict)
    kind: str = "decoder"


def _causal(config: str, model: str, base: dict = _GROUPED, **extra: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return getattr(hf, model)(getattr(hf, config)(**{**base, **extra}))

    return build


def _gpt_style(config: str, model: str, **extra: object) -> Callable[[], nn.Module]:
    base = {
        "vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS,
        "n_positions": POSITIONS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return _causal(config, model, base, **extra)


_GEMMA = {**_GROUPED, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}

ARCHITECTURES = (
    Architecture("llama", _causal("LlamaConfig", "LlamaForCausalLM")),
    Architecture("mistral", _causal("MistralConfig", "MistralForCausalLM", sliding_window=8)),
    Architecture("qwen2", _causal("Qwen2Config", "Qwen2ForCausalLM")),
    Architecture("qwen3", _causal("Qwen3Config", "Qwen3ForCausalLM", head_dim=8)),
    Architecture("gemma2", _causal("Gemma2Config", "Gemma2ForCausalLM", _GEMMA)),
    Architecture(
        "gemma3",
        _causal(
            "Gemma3TextConfig", "Gemma3ForCausalLM", _GEMMA,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),  # fmt: skip
    Architecture("phi", _causal("PhiConfig", "PhiForCausalLM", partial_rotary_factor=0.5)),
    Architecture("phi3", _causal("Phi3Config", "Phi3ForCausalLM")),
    Architecture("gpt2", _gpt_style("GPT2Config", "GPT2LMHeadModel")),
    Architecture(
        "gpt_neox", _causal("GPTNeoXConfig", "GPTNeoXForCausalLM", _COMMON, rotary_pct=0.5)
    ),
    Architecture("gptj", _gpt_style("GPTJConfig", "GPTJForCausalLM", rotary_dim=4)),
    Architecture(
        "opt",
        _causal("OPTConfig", "OPTForCausalLM", _COMMON, ffn_dim=FFN_WIDTH, word_embed_proj_dim=HIDDEN),
    ),
    Architecture(
        "falcon",
        _causal("FalconConfig", "FalconForCausalLM", _COMMON, multi_query=True, parallel_attn=True,
                new_decoder_architecture=False, bias=False, alibi=False),
    ),  # fmt: skip
    Architecture(
        "bloom",
        _causal("BloomConfig", "BloomForCausalLM", {**_COMMON, "n_layer": LAYERS, "n_head": HEADS}),
    ),
    Architecture("starcoder2", _causal("Starcoder2Config", "Starcoder2ForCausalLM")),
    Architecture("smollm3", _causal("SmolLM3Config", "SmolLM3ForCausalLM")),
    Architecture("olmo2", _causal("Olmo2Config", "Olmo2ForCausalLM")),
    Architecture("cohere", _causal("CohereConfig", "CohereForCausalLM")),
    Architecture(
        "deepseek_v3",
        _causal(
            "DeepseekV3Config", "DeepseekV3ForCausalLM", _COMMON, num_key_value_heads=HEADS,
            q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8,
            n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
            moe_intermediate_size=16, first_k_dense_replace=1, n_shared_experts=1,
        ),
    ),  # fmt: skip
    Architecture(
        "mixtral",
        _causal("MixtralConfig", "MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2),
    ),
    Architecture("bert", _causal("BertConfig", "BertModel", _COMMON), kind="encoder"),
    Architecture(
        "roberta",
        _causal("RobertaConfig", "RobertaModel", _COMMON, pad_token_id=1, max_position_embeddings=POSITIONS + 2),
        kind="encoder",
    ),
    Architecture(
        "distilbert",
        _causal("DistilBertConfig", "DistilBertModel", {"vocab_size": VOCABULARY, "dim": HIDDEN,
                "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": FFN_WIDTH,
                "max_position_embeddings": POSITIONS}),
        kind="encoder",
    ),  # fmt: skip
    Architecture(
        "modernbert",
        _causal("ModernBertConfig", "ModernBertModel", _COMMON, local_attention=16,
                cls_token_id=3, sep_token_id=4),
        kind="encoder",
    ),  # fmt: skip
    Architecture(
        "vit",
        _causal("ViTConfig", "ViTModel", {k: v for k, v in _COMMON.items() if "token" not in k and k != "vocab_size"}, image_size=16, patch_size=4),
        kind="vision",
    ),
    Architecture(
        "whisper",
        _causal(
            "WhisperConfig", "WhisperForConditionalGeneration",
            {"vocab_size": VOCABULARY, "d_model": HIDDEN, "encoder_layers": LAYERS, "decoder_layers": LAYERS,
             "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "encoder_ffn_dim": FFN_WIDTH,
             "decoder_ffn_dim": FFN_WIDTH, "num_mel_bins": 8, "max_source_positions": 16,
             "max_target_positions": POSITIONS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
             "decoder_start_token_id": 1},
        ),
        sites=2 * LAYERS, rejected={"cross-attention": LAYERS}, kind="encoder-decoder",
    ),  # fmt: skip
    Architecture(
        "t5",
        _causal("T5Config", "T5ForConditionalGeneration",
                {"vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": 8, "d_ff": FFN_WIDTH,
                 "num_layers": LAYERS, "num_heads": HEADS, "decoder_start_token_id": 0, "pad_token_id": 0}),
        sites=2 * LAYERS, rejected={"cross-attention": LAYERS}, kind="encoder-decoder",
    ),  # fmt: skip
)  # fmt: skip
BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}


def make(name: str, implementation: str = "sdpa", seed: int = 0) -> nn.Module:
    """Build a tiny model of the family with seeded random weights, in eval mode."""
    torch.manual_seed(seed)
    model = BY_NAME[name].build().eval()
    model.set_attn_implementation(implementation)
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
