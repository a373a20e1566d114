"""Published shapes with random weights: speed does not depend on the values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

# d 896, 24 layers, 14 query and 2 key/value heads, FFN 4,864, vocabulary 151,936, tied head.
QWEN_05B = {
    "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4_864,
    "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
    "max_position_embeddings": 32_768, "tie_word_embeddings": True,
}  # fmt: skip
# d 2,048, 16 layers, 32 query and 8 key/value heads of 64, FFN 8,192, vocabulary 128,256, tied.
LLAMA_1B = {
    "vocab_size": 128_256, "hidden_size": 2_048, "intermediate_size": 8_192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "max_position_embeddings": 131_072, "tie_word_embeddings": True,
}  # fmt: skip
# For trying the benchmark out.
TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 192,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 16_384, "tie_word_embeddings": True,
}  # fmt: skip

SHAPES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "qwen2.5-0.5b-shape": ("Qwen2", QWEN_05B),
    "llama-3.2-1b-shape": ("Llama", LLAMA_1B),
    "tiny-shape": ("Llama", TINY),
}
"""Name → (family of transformers, configuration)."""


def build(name: str, dtype: str = "float32", layers: int | None = None) -> nn.Module:
    """Return a model of a published shape with seeded random weights, in eval mode.

    Args:
        name: A key of ``SHAPES``.
        dtype: Of its weights.
        layers: Fewer or more than published.
    """
    import transformers

    family, settings = SHAPES[name]
    settings = settings if layers is None else {**settings, "num_hidden_layers": layers}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**settings)
    model: nn.Module = getattr(transformers, f"{family}ForCausalLM")(config)
    return model.to(getattr(torch, dtype)).eval()
