"""Softmaxes that are no attention, each between a hidden state and an output projection."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from helpers.attention_blocks import Form
from torch import Tensor, nn


class Gate(nn.Module):
    """A softmax over features as a gate on the values."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(form.hidden, form.hidden)
        self.v_proj = nn.Linear(form.hidden, form.hidden)
        self.o_proj = nn.Linear(form.hidden, form.hidden)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.o_proj(self.gate_proj(x).softmax(-1) * self.v_proj(x))


class Experts(nn.Module):
    """A router's softmax, and a product that mixes the experts' outputs for each token."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.router = nn.Linear(form.hidden, 3)
        self.experts = nn.Linear(form.hidden, 3 * form.hidden)
        self.o_proj = nn.Linear(form.hidden, form.hidden)

    def route(self, x: Tensor) -> Tensor:
        """Return one score an expert, [B, T, 3]."""
        return self.router(x)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        outputs = self.experts(x).unflatten(-1, (3, -1))
        weights = F.softmax(self.route(x) / 2, dim=-1)
        return self.o_proj((weights.unsqueeze(-2) @ outputs).squeeze(-2))


class ExpertsByMatmul(Experts):
    """The router is a product with a transposed weight."""

    def route(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.router.weight.t())


class ExpertsByEinsum(Experts):
    def route(self, x: Tensor) -> Tensor:
        return torch.einsum("btd,ed->bte", x, self.router.weight)


class Pooling(nn.Module):
    """Softmax over tokens of one learned score each; their mean, given to all."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.score = nn.Linear(form.hidden, 1)
        self.v_proj = nn.Linear(form.hidden, form.hidden)
        self.o_proj = nn.Linear(form.hidden, form.hidden)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        weights = self.score(x).softmax(dim=1)
        return self.o_proj(weights.transpose(1, 2) @ self.v_proj(x)).expand_as(x)


class SoftLookUp(nn.Module):
    """A distribution over a vocabulary, embedded again by the same weight."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.head = nn.Linear(form.hidden, 7, bias=False)
        self.o_proj = nn.Linear(form.hidden, form.hidden)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.o_proj(torch.matmul(self.head(x).softmax(-1), self.head.weight))


class Logits(nn.Module):
    """A softmax over logits, returned."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.head = nn.Linear(form.hidden, 7)
        self.o_proj = nn.Linear(form.hidden, form.hidden)

    def forward(self, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        return self.o_proj(x), self.head(x).softmax(-1)
