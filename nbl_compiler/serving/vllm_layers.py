"""What stands in vLLM's decoder layers where a plan replaces attention or an FFN.

Tensor parallel: of y = W x each process multiplies its slice of x by its columns of W, and one
all-reduce adds the parts up. A folded FFN adds its two parts before that all-reduce.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear

from nbl_compiler.plans import Site
from nbl_compiler.serving.plan_weights import padded_count


class LinearAttention(nn.Module):
    """y = W x + b in place of attention: no queries, keys or values, and no KV cache.

    Args:
        width: d.
        prefix: The module's path.
    """

    def __init__(self, width: int, prefix: str) -> None:
        super().__init__()
        self.map = RowParallelLinear(
            width, width, bias=True, input_is_parallel=False, prefix=f"{prefix}.map"
        )

    def forward(self, positions: Tensor, hidden_states: Tensor, **_: Any) -> Tensor:
        """Return y [tokens, d] for ``hidden_states`` [tokens, d]."""
        output: Tensor = self.map(hidden_states)[0]
        return output


class StreamInFront(nn.Module):
    """The residual addition in front of a norm, without the norm.

    Stands where ``input_layernorm`` stood, for a map that reads the residual stream.
    """

    def forward(
        self, hidden_states: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the stream, and as vLLM's fused norms do the stream again as the residual."""
        if residual is None:
            return hidden_states
        stream = hidden_states + residual
        return stream, stream


class FoldedFFN(nn.Module):
    """The kept neurons as a small gated FFN, and all others folded into one map: V h_K + M x + b.

    Args:
        width: d.
        site: The plan's site.
        activation: vLLM's fused activation and product, [tokens, 2 k] → [tokens, k].
        bias: Whether gate and up projections have biases.
        prefix: The module's path.
    """

    def __init__(
        self, width: int, site: Site, activation: nn.Module, bias: bool, prefix: str
    ) -> None:
        super().__init__()
        self.parallel = get_tensor_model_parallel_world_size()
        kept = padded_count(int(site.details["kept"]), self.parallel)
        self.gate_up_proj = self.down_proj = self.map = None
        if kept:
            self.gate_up_proj = MergedColumnParallelLinear(
                width, [kept] * 2, bias=bias, prefix=f"{prefix}.gate_up_proj"
            )
            self.act_fn = activation
            self.down_proj = RowParallelLinear(
                kept, width, bias=False, reduce_results=False, prefix=f"{prefix}.down_proj"
            )
        if "weight" in site.tensors:
            self.map = RowParallelLinear(
                width, width, bias=False, input_is_parallel=False, reduce_results=False,
                prefix=f"{prefix}.map",
            )  # fmt: skip
        self.bias = nn.Parameter(torch.empty(width), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return y [tokens, d] for x [tokens, d]."""
        parts = []
        if self.gate_up_proj is not None and self.down_proj is not None:
            hidden, _ = self.gate_up_proj(x)
            parts.append(self.down_proj(self.act_fn(hidden))[0])
        if self.map is not None:
            parts.append(self.map(x)[0])
        total: Tensor = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        if self.parallel > 1:
            total = tensor_model_parallel_all_reduce(total)
        return total + self.bias
