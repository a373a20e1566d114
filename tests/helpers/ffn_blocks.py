"""Small FFNs in the spellings that models use, and everything about them that can vary."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.bloom.modeling_bloom import bloom_gelu_forward
from transformers.pytorch_utils import Conv1D

Function = Callable[[Tensor], Tensor]


def _from_the_book(z: Tensor) -> Tensor:
    """GELU with a constant that is a tensor, as tutorials write it."""
    slope = torch.sqrt(torch.tensor(2.0 / math.pi))
    return 0.5 * z * (1 + torch.tanh(slope * (z + 0.044715 * torch.pow(z, 3))))


def _in_half_precision(z: Tensor) -> Tensor:
    return torch.sigmoid(z.float()).type_as(z) * z


SPELLINGS: dict[str, tuple[str, Function]] = {
    "F.gelu": ("gelu", F.gelu),
    "gelu_python": ("gelu", ACT2FN["gelu_python"]),
    "gelu by erfc": ("gelu", lambda z: z * torch.erfc(-z / math.sqrt(2)) / 2),
    "gelu_pytorch_tanh": ("gelu_tanh", ACT2FN["gelu_pytorch_tanh"]),
    "gelu_new": ("gelu_tanh", ACT2FN["gelu_new"]),
    "gelu_fast": ("gelu_tanh", ACT2FN["gelu_fast"]),
    "gelu_accurate": ("gelu_tanh", ACT2FN["gelu_accurate"]),
    "gelu_python_tanh": ("gelu_tanh", ACT2FN["gelu_python_tanh"]),
    "bloom": ("gelu_tanh", bloom_gelu_forward),
    "book": ("gelu_tanh", _from_the_book),
    "quick_gelu": ("quick_gelu", ACT2FN["quick_gelu"]),
    "quick_gelu by method": ("quick_gelu", lambda z: z.mul(1.702).sigmoid().mul(z)),
    "silu": ("silu", ACT2FN["silu"]),
    "swish": ("silu", ACT2FN["swish"]),
    "z sigmoid(z)": ("silu", lambda z: z * torch.sigmoid(z)),
    "z sigmoid(z) in float32": ("silu", _in_half_precision),
    "z / (1 + exp(-z))": ("silu", lambda z: z / (1 + torch.exp(-z))),
    "silu in place": ("silu", nn.SiLU(inplace=True)),
    "relu": ("relu", ACT2FN["relu"]),
    "torch.relu": ("relu", torch.relu),
    "relu in place": ("relu", nn.ReLU(inplace=True)),
    "relu_": ("relu", lambda z: z.relu_()),
    "clamp": ("relu", lambda z: z.clamp(min=0)),
    "maximum": ("relu", lambda z: torch.maximum(z, torch.zeros_like(z))),
    "where": ("relu", lambda z: torch.where(z > 0, z, 0)),
    "relu2": ("relu2", ACT2FN["relu2"]),
    "relu ** 2": ("relu2", lambda z: F.relu(z) ** 2),
    "relu times itself": ("relu2", lambda z: (r := F.relu(z)) * r),
}
"""Spelling → (its name in ``ACTIVATION_NAMES``, the function)."""

UNKNOWN: dict[str, tuple[str, Function]] = {
    "tanh": ("`tanh`", ACT2FN["tanh"]),
    "sigmoid": ("`sigmoid`", ACT2FN["sigmoid"]),
    "mish": ("`mish`", ACT2FN["mish"]),
    "gelu_10": ("`gelu`, `clip`", ACT2FN["gelu_10"]),
    "relu6": ("`hardtanh`", ACT2FN["relu6"]),
    "leaky_relu": ("`leaky_relu`", ACT2FN["leaky_relu"]),
    "laplace": ("`erf`", ACT2FN["laplace"]),
    "elu": ("`elu`", F.elu),
    "half": ("`gelu`", lambda z: 0.5 * F.gelu(z)),
    "shifted": ("`silu`", lambda z: F.silu(z) + 0.001),
    "steeper": ("`sigmoid`", lambda z: z * torch.sigmoid(1.7 * z)),
    "cubed": ("`relu`", lambda z: F.relu(z) ** 3),
}
"""Name → (what the reason calls it, the function)."""


@dataclass(frozen=True)
class Form:
    """What varies about an FFN.

    Args:
        kind: ``"plain"``, ``"gated"``, or ``"fused"`` (gate and up are one projection).
        spelling: Of the activation.
        width: Size d of the hidden state.
        inner: Size m of the intermediate.
        rank: Number of dimensions of the hidden state.
        bias: Whether the inner projections have biases.
        down_bias: Whether the down projection has one.
        layer: How projections are spelled: ``"linear"``, ``"conv1d"``, ``"matmul"`` (Falcon's, the
            bias is added separately) or ``"flat"`` (the tokens are flattened around the FFN).
        gate_first: Whether the activation acts on the first half of a fused projection.
        act_first: Whether the activation is the product's first factor.
        split: How halves are taken: ``"chunk"``, ``"split"``, ``"slice"`` or ``"narrow"``.
        dropout: Whether a dropout (off) lies in between.
        dtype: Of weights and hidden state.
    """

    kind: str = "plain"
    spelling: str = "F.gelu"
    width: int = 8
    inner: int = 12
    rank: int = 3
    bias: bool = True
    down_bias: bool = True
    layer: str = "linear"
    gate_first: bool = True
    act_first: bool = True
    split: str = "chunk"
    dropout: bool = False
    dtype: torch.dtype = torch.float64

    def but(self, **changes: object) -> Form:
        """Return the form with some things changed."""
        return replace(self, **changes)


class Matmul(nn.Module):
    """``x @ Wᵀ``, and then the bias."""

    def __init__(self, n_in: int, n_out: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in) / n_in**0.5)
        self.bias = nn.Parameter(torch.randn(n_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


def layer(form: Form, n_in: int, n_out: int, bias: bool) -> nn.Module:
    """Return a linear layer in the form's spelling; ``Conv1D`` always has a bias."""
    if form.layer == "conv1d":
        made: nn.Module = Conv1D(n_out, n_in)
        nn.init.normal_(made.weight, std=n_in**-0.5)
        nn.init.normal_(made.bias)
        return made
    if form.layer == "matmul":
        return Matmul(n_in, n_out, bias)
    return nn.Linear(n_in, n_out, bias=bias)


class FFN(nn.Module):
    """An FFN on a residual stream; subclasses change one step."""

    def __init__(self, form: Form, act: Function | None = None) -> None:
        super().__init__()
        self.form = form
        self.act = act or SPELLINGS[form.spelling][1]
        inner = form.inner * (2 if form.kind == "fused" else 1)
        self.up = layer(form, form.width, inner, form.bias)
        self.gate = layer(form, form.width, inner, form.bias) if form.kind == "gated" else None
        self.drop = nn.Dropout(0.5 if form.dropout else 0.0)
        self.down = layer(form, form.inner, form.width, form.down_bias)
        self.to(form.dtype).eval()

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (gate, up) before the activation."""
        if self.gate is not None:
            return self.gate(x), self.up(x)
        both, m = self.up(x), self.form.inner
        if self.form.split == "chunk":
            first, second = both.chunk(2, dim=-1)
        elif self.form.split == "split":
            first, second = torch.split(both, [m, m], dim=-1)
        elif self.form.split == "narrow":
            first, second = both.narrow(-1, 0, m), both.narrow(-1, m, m)
        else:
            first, second = both[..., :m], both[..., m:]
        return (first, second) if self.form.gate_first else (second, first)

    def inner(self, x: Tensor) -> Tensor:
        """Return what the down projection reads."""
        if self.form.kind == "plain":
            return self.act(self.up(x))
        gate, up = self.halves(x)
        return self.act(gate) * up if self.form.act_first else up * self.act(gate)

    def out(self, z: Tensor) -> Tensor:
        """Return the FFN's output from what the down projection reads."""
        return self.down(self.drop(z))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]) if self.form.layer == "flat" else x
        return x + self.out(self.inner(flat)).view(x.shape)


def hidden(form: Form, seed: int = 0) -> Tensor:
    """Return a hidden state [..., d] for the form."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, 2, 3)[-form.rank + 1 :] if form.rank > 1 else ()
    return torch.randn(*shape, form.width, generator=generator, dtype=torch.float64).to(form.dtype)
