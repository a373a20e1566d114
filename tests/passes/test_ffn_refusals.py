"""FFNs with one step changed, each refused for that step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.ffn_blocks import FFN, Form, hidden
from helpers.ffn_graphs import matches_of, refusal_of
from torch import Tensor, nn

PLAIN, GATED, FUSED = (Form(kind=kind) for kind in ("plain", "gated", "fused"))
OTHER = hidden(PLAIN, seed=1)


class ReturnsActivation(FFN):
    def forward(self, x: Tensor) -> Any:
        z = self.inner(x)
        return x + self.down(z), z


class ReturnsUp(FFN):
    def forward(self, x: Tensor) -> Any:
        gate, up = self.halves(x)
        return x + self.down(self.act(gate) * up), up


class ReturnsBeforeActivation(FFN):
    def forward(self, x: Tensor) -> Any:
        z = self.up(x)
        return x + self.down(self.act(z)), z


class SecondActivation(FFN):
    """What the activation makes is also used inside the elementwise region."""

    def forward(self, x: Tensor) -> Any:
        z = self.act(self.up(x))
        return x + self.down(z), z * 3


@pytest.mark.parametrize(
    ("block", "node", "reader"),
    [
        (ReturnsActivation(PLAIN), "z", "output"),
        (ReturnsActivation(GATED), "z", "output"),
        (ReturnsUp(GATED), "up", "output"),
        (ReturnsUp(FUSED), "second", "output"),
        (ReturnsBeforeActivation(PLAIN), "z", "output"),
        (SecondActivation(PLAIN), "z", "mul"),
    ],
)
def test_an_intermediate_used_outside(block: FFN, node: str, reader: str) -> None:
    refusal = refusal_of(block, hidden(block.form))
    assert refusal.node == node
    assert refusal.reason == (f"the intermediate `{node}` is used outside the region by `{reader}`")


def test_a_shape_read_outside_is_no_use() -> None:
    class ReadsShape(FFN):
        def forward(self, x: Tensor) -> Any:
            z = self.act(self.up(x))
            return x + self.down(z), z.shape[0] * z.size(1)

    assert len(matches_of(ReadsShape(PLAIN), hidden(PLAIN), dynamic=True).found) == 1


class TwoInputs(FFN):
    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return x + self.down(self.act(self.gate(x)) * self.up(other))


class Overwritten(FFN):
    def forward(self, x: Tensor) -> Tensor:
        h = x * 2
        gate = self.gate(h)
        h.add_(1)
        return x + self.down(self.act(gate) * self.up(h))


class OverwrittenByAnActivation(FFN):
    def forward(self, x: Tensor) -> Any:
        h = x * 2
        gate = self.gate(h)
        positive = F.relu(h, inplace=True)
        return x + self.down(self.act(gate) * self.up(h)), positive


def test_two_hidden_states() -> None:
    refusal = refusal_of(TwoInputs(GATED), hidden(GATED), OTHER)
    assert refusal.reason == "gate and up read different hidden states: `l_x_`, `l_other_`"


@pytest.mark.parametrize(
    ("block", "write"), [(Overwritten, "add_"), (OverwrittenByAnActivation, "positive")]
)
def test_a_hidden_state_overwritten_in_between(block: type[FFN], write: str) -> None:
    refusal = refusal_of(block(GATED), hidden(GATED))
    assert refusal.reason == f"more than one hidden input: `{write}` overwrites the first"


@pytest.mark.parametrize("form", [PLAIN, GATED, FUSED])
def test_active_dropout(form: Form) -> None:
    block = FFN(form.but(dropout=True)).train()
    refusal = refusal_of(block, hidden(form))
    assert refusal.reason == "dropout is active; call model.eval() first"
    assert refusal.node == "dropout"
    assert len(matches_of(block.eval(), hidden(form)).found) == 1


class NoDown(FFN):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class NoUp(FFN):
    def inner(self, x: Tensor) -> Tensor:
        return self.act(x) if self.gate is None else self.act(x) * self.up(x)


class NoFactor(FFN):
    def inner(self, x: Tensor) -> Tensor:
        return self.act(self.gate(x)) * x


SQUARE = {"width": 8, "inner": 8}


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (NoDown(PLAIN), "missing down projection: `gelu` enters none"),
        (NoDown(GATED), "missing down projection: `mul` enters none"),
        (NoDown(FUSED), "missing down projection: `mul` enters none"),
        (NoUp(PLAIN.but(**SQUARE)), "missing projection: the activation reads `l_x_`"),
        (NoUp(GATED.but(**SQUARE)), "missing projection: the activation reads `l_x_`"),
        (NoFactor(GATED.but(**SQUARE)), "missing projection: the gate multiplies `l_x_`"),
    ],
)
def test_missing_projections(block: FFN, reason: str) -> None:
    assert refusal_of(block, hidden(block.form)).reason.startswith(reason)


class LoRA(nn.Module):
    """An adapter that was not merged."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.b = nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x)) * 0.5


class Computed(nn.Module):
    """A weight that is computed from parameters, as DoRA's or a weight norm's."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.base.weight * 2, self.base.bias)


class Quantized(nn.Module):
    """A weight that is a buffer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", base.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


ADAPTERS = [
    ("plain", LoRA, "up", "the activation reads several projections: `"),
    ("gated", LoRA, "gate", "the activation reads several projections: `"),
    ("gated", LoRA, "up", "the gate multiplies `"),
    ("plain", LoRA, "down", "the intermediate enters several layers: `"),
    ("gated", LoRA, "down", "the intermediate enters several layers: `"),
    ("plain", Computed, "up", "the weight of `"),
    ("plain", Computed, "down", "the weight of `"),
    ("plain", Quantized, "up", "the weight of `"),
    ("gated", Quantized, "gate", "the weight of `"),
    ("gated", Quantized, "up", "the gate multiplies `"),
    ("plain", Quantized, "down", "the weight of `"),
]


@pytest.mark.parametrize(("kind", "wrapper", "place", "reason"), ADAPTERS)
def test_adapters_and_weights_that_are_no_parameters(
    kind: str, wrapper: type[nn.Module], place: str, reason: str
) -> None:
    block = FFN(Form(kind=kind))
    setattr(block, place, wrapper(getattr(block, place)))
    assert refusal_of(block, hidden(block.form)).reason.startswith(reason)


class NormInBetween(FFN):
    def __init__(self, form: Form) -> None:
        super().__init__(form)
        self.norm = nn.RMSNorm(form.inner, dtype=form.dtype)

    def out(self, z: Tensor) -> Tensor:
        return self.down(self.norm(z))


class DoubledProduct(FFN):
    def out(self, z: Tensor) -> Tensor:
        return self.down(2 * z)


class Interleaved(FFN):
    def inner(self, x: Tensor) -> Tensor:
        both = self.up(x)
        return self.act(both[..., ::2]) * both[..., 1::2]


class TwoActivations(FFN):
    def inner(self, x: Tensor) -> Tensor:
        gate, up = self.halves(x)
        return self.act(gate) * torch.tanh(up)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (NormInBetween(PLAIN), "lies between the activation and the down projection"),
        (NormInBetween(GATED), "lies between the activation and the down projection"),
        (DoubledProduct(GATED), "lies between the activation and the down projection"),
        (DoubledProduct(PLAIN), "unknown activation: `gelu`"),
        (Interleaved(FUSED), "rearranges the outputs of"),
        (TwoActivations(GATED), "which is not just a projection"),
        (TwoActivations(FUSED), "which is not just a projection"),
    ],
)
def test_operations_in_between(block: FFN, reason: str) -> None:
    assert reason in refusal_of(block, hidden(block.form)).reason


class StackedExperts(nn.Module):
    """Routed experts with stacked weights, gated, every token through each expert."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 8, 24))
        self.down = nn.Parameter(torch.randn(2, 12, 8))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = torch.bmm(x.reshape(1, -1, 8).expand(2, -1, -1), self.up).chunk(2, dim=-1)
        return torch.bmm(F.silu(gate) * up, self.down).sum(0)


def test_stacked_experts() -> None:
    refusal = refusal_of(StackedExperts(), torch.randn(2, 3, 8))
    assert refusal.reason == (
        "mixture of experts: `bmm` multiplies by the weights of routed experts"
    )


def test_an_expert_on_chosen_tokens() -> None:
    block, x = FFN(GATED), hidden(GATED).reshape(-1, GATED.width)

    def routed(x: Tensor, chosen: Tensor) -> Tensor:
        tokens = x[chosen]
        return x.index_add(0, chosen, block.out(block.inner(tokens)))

    refusal = refusal_of(routed, x, torch.tensor([0, 2]))
    assert refusal.reason == ("mixture of experts: `tokens` holds the tokens that were routed here")
