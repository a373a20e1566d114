"""What has activations and linear layers, and is no FFN: heads, poolers, gates of other things."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.ffn_graphs import matches_of, refusal_of
from torch import Tensor, nn


@pytest.mark.parametrize("act", [nn.GELU(), nn.ReLU()])
def test_a_head_is_not_as_wide_as_its_input(act: nn.Module) -> None:
    """DistilBERT's classifier."""
    head = nn.Sequential(nn.Linear(8, 8), act, nn.Dropout(0.2), nn.Linear(8, 3)).eval()
    refusal = refusal_of(head, torch.randn(2, 8))
    assert refusal.reason == (
        "the output's width is 3 where the hidden state's is 8: a head or projector, not an FFN"
    )


class GatedAttention(nn.Module):
    """Attention whose output is gated by an activation of the hidden state (Qwen3-Next)."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.q, self.k, self.v, self.g, self.o = (nn.Linear(8, 8) for _ in range(5))
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
        return self.o(mixed * self.act(self.g(x)))


class StateSpace(nn.Module):
    """Mamba's skeleton: a convolution, its activation, and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.out = nn.Linear(8, 16), nn.Linear(8, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        states, gate = self.inside(x).chunk(2, dim=-1)
        states = F.silu(self.conv(states.transpose(1, 2))).transpose(1, 2)
        return self.out(states.cumsum(1) * F.silu(gate))


class Router(nn.Module):
    """Sigmoid scores of experts, as DeepSeek-V3's."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.out = nn.Linear(8, 4), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x) * torch.sigmoid(self.gate(x)).amax(-1, keepdim=True)


class Receptance(nn.Module):
    """RWKV's channel mixing: the FFN reads one mix of tokens, its gate another."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.key, self.value, self.gate = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 8)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        mixed = x + x.roll(1, 1)
        return self.act(self.gate(x)) * self.value(F.relu(self.key(mixed)) ** 2)


class TimeMixing(nn.Module):
    """RWKV's attention for one token: elementwise between linear layers of two mixes."""

    def __init__(self) -> None:
        super().__init__()
        self.receptance, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        mixed = x + x.roll(1, 1)
        weighted = torch.exp(self.key(mixed)) * self.value(mixed)
        return self.out(F.silu(self.receptance(x)) * weighted)


class BlockDiagonalGates(nn.Module):
    """RecurrentGemma's gates: stacked weights that are no experts'."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Parameter(torch.randn(2, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        heads = x.reshape(-1, 2, 4).transpose(0, 1)
        gates = torch.sigmoid(torch.bmm(heads, self.blocks))
        return (gates * heads).cumsum(1)


NO_FFN = {
    "pooler": nn.Sequential(nn.Linear(8, 8), nn.Tanh()),
    "head of a masked language model": nn.Sequential(
        nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 20)
    ),
    "classifier with tanh": nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)),
    "convolutions": nn.Sequential(nn.Conv1d(3, 4, 1), nn.GELU(), nn.Conv1d(4, 3, 1)),
    "gate of attention": GatedAttention(nn.Sigmoid()),
    "SiLU gate of attention": GatedAttention(nn.SiLU()),
    "state-space model": StateSpace(),
    "attention of RWKV": TimeMixing(),
    "router": Router(),
    "block-diagonal gates": BlockDiagonalGates(),
    "activation without layers": nn.GELU(),
    "two linear layers": nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8)),
    "low rank with a norm": nn.Sequential(nn.Linear(8, 4), nn.RMSNorm(4), nn.Linear(4, 8)),
}


@pytest.mark.parametrize("name", NO_FFN)
def test_what_is_no_ffn_is_not_listed(name: str) -> None:
    matches = matches_of(NO_FFN[name].eval(), torch.randn(2, 3, 8))
    assert matches.found == matches.rejected == ()


@pytest.mark.parametrize("act", [nn.Sigmoid(), nn.SiLU()])
def test_a_receptance_gate_does_not_hide_the_ffn(act: nn.Module) -> None:
    matches = matches_of(Receptance(act), torch.randn(2, 3, 8))
    assert [m.activation for m in matches.found] == ["relu2"]
    assert matches.rejected == ()
