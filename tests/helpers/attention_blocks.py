"""Generated transformer blocks around plain attention, in the spellings that models use.

Shapes: tokens [B, T, d], heads [B, H, T, D].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH, TOKENS = 2, 5


@dataclass(frozen=True)
class Form:
    """How a plain block is spelled.

    Args:
        heads: Number of query heads H.
        kv_heads: Number of key and value heads; divides ``heads``.
        head_dim: Size D of a head.
        hidden: Size d of the hidden state.
        split: Whether heads get a dimension of their own (needed for more than one).
        halves: Whether each half of every head's features is attended to on its own.
        eager: ``matmul → softmax → matmul`` instead of ``scaled_dot_product_attention``.
        fused: One linear for queries, keys and values.
        bias: Whether the linears have a bias.
        qk_norm: Whether queries and keys are normed.
        rotary: Whether queries and keys are turned by their positions.
        causal: Whether there is a mask.
        before: What the residual stream comes from: the graph's ``"input"``, a ``"linear"``
            embedding, or another plain ``"block"``.
    """

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 4
    hidden: int = 16
    split: bool = True
    halves: bool = False
    eager: bool = False
    fused: bool = False
    bias: bool = False
    qk_norm: bool = False
    rotary: bool = False
    causal: bool = False
    before: str = "input"


class Attention(nn.Module):
    """Plain attention; look-alikes override one of its steps.

    Args:
        form: How it is spelled.
    """

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form
        queries, keys = form.heads * form.head_dim, form.kv_heads * form.head_dim
        self.sizes = [queries, keys, keys]
        if form.fused:
            self.qkv_proj = nn.Linear(form.hidden, sum(self.sizes), form.bias)
        else:
            self.q_proj = nn.Linear(form.hidden, queries, form.bias)
            self.k_proj = nn.Linear(form.hidden, keys, form.bias)
            self.v_proj = nn.Linear(form.hidden, keys, form.bias)
        self.o_proj = nn.Linear(queries, form.hidden, form.bias)
        self.q_norm = nn.RMSNorm(form.head_dim) if form.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(form.head_dim) if form.qk_norm else nn.Identity()

    def forward(self, x: Tensor, other: Tensor) -> Any:
        """Return y [B, T, d], for some look-alikes with a tensor beside it."""
        q, k, v = (self.split(part) for part in self.project(x, other))
        q, k = self.turn(self.q_norm(q)), self.turn(self.k_norm(k))
        groups = self.form.heads // self.form.kv_heads
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        mask = self.mask(x, other)
        if self.form.halves:
            halves = zip(*(part.chunk(2, dim=-1) for part in (q, k, v)), strict=True)
            mixed = torch.cat([self.mix(*half, mask) for half in halves], dim=-1)
        else:
            mixed = self.mix(q, k, v, mask)
        return self.finish(self.merge(mixed), x, (q, k, v))

    def project(self, x: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values, [B, T, heads · D]."""
        del other
        if self.form.fused:
            return tuple(self.qkv_proj(x).split(self.sizes, dim=-1))
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def split(self, flat: Tensor) -> Tensor:
        """Return [B, heads, T, D]."""
        if not self.form.split:
            return flat
        return flat.unflatten(-1, (-1, self.form.head_dim)).transpose(1, 2)

    def merge(self, part: Tensor) -> Tensor:
        """Undo ``split``."""
        return part.transpose(1, 2).flatten(2) if self.form.split else part

    def turn(self, part: Tensor) -> Tensor:
        """Turn pairs of features by angles that grow with the position."""
        if not self.form.rotary:
            return part
        angle = torch.arange(part.shape[-2], device=part.device)[:, None] * 0.5
        one, two = part.chunk(2, dim=-1)
        return part * angle.cos() + torch.cat((-two, one), dim=-1) * angle.sin()

    def mask(self, x: Tensor, other: Tensor) -> Tensor | None:
        """Return what is added to the scores, [T, T]."""
        del other
        if not self.form.causal:
            return None
        return torch.full((x.shape[1], x.shape[1]), -1e9, device=x.device).triu(1)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Return the mixed values, [B, H, T, D]."""
        if not self.form.eager:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return torch.matmul(self.weigh(q, k, mask), v)

    def weigh(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        """Return the attention weights of the eager spelling, [B, H, T, T]."""
        scores = torch.matmul(q, k.transpose(-1, -2)) * self.form.head_dim**-0.5
        return F.softmax(scores if mask is None else scores + mask, dim=-1)

    def finish(self, mixed: Tensor, x: Tensor, heads: tuple[Tensor, Tensor, Tensor]) -> Any:
        """Return the result from the mixed values [B, T, H · D]."""
        del x, heads
        return self.o_proj(mixed)


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, attention: nn.Module, hidden: int) -> None:
        super().__init__()
        self.norm, self.ffn_norm = nn.LayerNorm(hidden), nn.RMSNorm(hidden)
        self.attention = attention
        self.up, self.down = nn.Linear(hidden, 2 * hidden), nn.Linear(2 * hidden, hidden)

    def forward(self, x: Tensor, other: Tensor) -> Any:
        """Return the next residual stream [B, T, d], and what attention returned beside y."""
        result = self.attention(self.norm(x), other)
        y, *beside = result if isinstance(result, tuple) else (result,)
        x = x + y
        return x + self.down(F.gelu(self.up(self.ffn_norm(x)))), *beside


class Model(nn.Module):
    """One block, behind what ``form.before`` says.

    Args:
        form: How the block is spelled.
        kind: The attention of the block that is looked at.
    """

    def __init__(self, form: Form, kind: type[nn.Module]) -> None:
        super().__init__()
        self.form = form
        self.embedding = nn.Linear(form.hidden, form.hidden) if form.before == "linear" else None
        kinds = (Attention, kind) if form.before == "block" else (kind,)
        self.blocks = nn.ModuleList(Block(k(form), form.hidden) for k in kinds)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in self.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator))
                weight.mul_(weight.shape[-1] ** -0.5)
        self.eval()

    @property
    def site(self) -> str:
        """Name of the site that is looked at, or would be one."""
        return f"blocks.{len(self.blocks) - 1}.attention"

    def forward(self, x: Tensor, other: Tensor) -> Any:
        """Return the residual stream [B, T, d], and what the last attention returned beside y."""
        beside: list[Tensor] = []
        if self.embedding is not None:
            x = self.embedding(x)
        for block in self.blocks:
            x, *beside = block(x, other)
        return x, *beside


def tokens(form: Form) -> tuple[Tensor, Tensor]:
    """Return the model's two inputs, [B, T, d] each."""
    generator = torch.Generator().manual_seed(1)
    x, other = torch.randn(2, BATCH, TOKENS, form.hidden, generator=generator)
    return x, other
