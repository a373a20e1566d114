"""Calls that look like a step of an FFN and compute something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
from helpers.ffn_blocks import FFN, Form, hidden
from helpers.ffn_graphs import matches_of, refusal_of
from torch import Tensor, nn

PLAIN, GATED, FUSED = (Form(kind=kind) for kind in ("plain", "gated", "fused"))


class Reinterpreted(FFN):
    """The bits of a float16 read as a bfloat16."""

    def out(self, z: Tensor) -> Tensor:
        return self.down(z.view(torch.bfloat16))


def test_another_view_of_the_bits_is_an_operation() -> None:
    form = PLAIN.but(dtype=torch.float16)
    block = Reinterpreted(form)
    block.down.bfloat16()
    refusal = refusal_of(block, hidden(form))
    assert "lies between the activation and the down projection" in refusal.reason


class WrittenBeforeRead(FFN):
    """σ(z)², because the product reads what was written into z; it would be SiLU otherwise."""

    def inner(self, x: Tensor) -> Tensor:
        z = self.up(x)
        written = z.sigmoid_()
        return z * written


def test_an_in_place_call_whose_operand_is_read_again() -> None:
    assert matches_of(WrittenBeforeRead(PLAIN), hidden(PLAIN)).found == ()


class Rounded(FFN):
    """A cast that loses the values."""

    def out(self, z: Tensor) -> Tensor:
        return self.down(z.to(torch.int32).to(z.dtype))


def test_a_cast_to_integers_is_an_operation() -> None:
    refusal = refusal_of(Rounded(PLAIN), hidden(PLAIN))
    assert "lies between the activation and the down projection" in refusal.reason


class Broadcast(FFN):
    """A gate with one value for each token."""

    def __init__(self, form: Form) -> None:
        super().__init__(form)
        self.up = nn.Linear(form.width, 1, dtype=form.dtype)


def test_a_broadcast_factor_is_no_second_half() -> None:
    assert matches_of(Broadcast(GATED), hidden(GATED)).found == ()


class HalvesOfTokens(FFN):
    """Gate and up are different tokens, not different neurons."""

    def inner(self, x: Tensor) -> Tensor:
        both = self.up(x)
        if self.form.split == "narrow":
            first, second = both.narrow(0, 0, 1), both.narrow(0, 1, 1)
        else:
            first, second = both.chunk(2)
        return self.act(first) * second

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.inner(x))


@pytest.mark.parametrize("split", ["chunk", "narrow"])
def test_parts_of_another_dimension(split: str) -> None:
    block = HalvesOfTokens(PLAIN.but(split=split))
    assert "rearranges the outputs of" in refusal_of(block, hidden(PLAIN)).reason


class WeightedSum(nn.Module):
    """``addmm`` that does not just add the bias."""

    def __init__(self, **factors: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))
        self.down, self.factors = nn.Linear(8, 8), factors

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(torch.addmm(self.bias, x, self.weight, **self.factors)))


def test_factors_of_addmm() -> None:
    x = torch.randn(3, 8)
    assert len(matches_of(WeightedSum(), x).found) == 1
    assert len(matches_of(WeightedSum(alpha=1), x).found) == 1
    assert matches_of(WeightedSum(beta=2), x).found == ()
    assert matches_of(WeightedSum(alpha=0.5), x).found == ()


class HalfFlattened(FFN):
    """The gate reads flattened tokens, up does not, and the output stays flat."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.gate is not None
        flat = x.reshape(-1, x.shape[-1])
        up = self.up(x).reshape(-1, self.form.inner)
        return self.down(self.act(self.gate(flat)) * up) + flat


def test_hidden_states_of_different_shape() -> None:
    refusal = refusal_of(HalfFlattened(GATED), hidden(GATED))
    assert refusal.reason.startswith("output of shape (6, 8) does not follow input (2, 3, 8)")


class WhereIndices(FFN):
    """``where`` with one operand returns indices."""

    def forward(self, x: Tensor) -> Any:
        z = self.up(x)
        return x + self.down(self.act(z)), torch.where(z > 0)


def test_indices_are_no_activation() -> None:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        refusal = refusal_of(WhereIndices(PLAIN), hidden(PLAIN))
    assert refusal.reason == "the intermediate `z` is used outside the region by `gt`"
