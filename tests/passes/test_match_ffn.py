"""FFN sites in generated modules: every spelling is found and rebuilt from its match."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.ffn_blocks import FFN, SPELLINGS, UNKNOWN, Form, hidden
from helpers.ffn_graphs import matches_of, rebuilt_and_actual, refusal_of, trace
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from nbl_compiler.passes.ffn_sites import FFNMatch
from nbl_compiler.passes.match_attention import MatchAttention
from nbl_compiler.passes.match_ffn import match_ffn

# Of the output's deviation. float64: models write sqrt(2/π) with 8 digits, or in float32. Others:
# some tens of roundings of 2⁻²⁴ and 2⁻⁸.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 0.1}
FORMS = st.builds(
    Form,
    kind=st.sampled_from(["plain", "gated", "fused"]),
    spelling=st.sampled_from(sorted(SPELLINGS)),
    width=st.integers(2, 9),
    inner=st.integers(1, 9),
    rank=st.integers(2, 4),
    bias=st.booleans(),
    down_bias=st.booleans(),
    layer=st.sampled_from(["linear", "conv1d", "matmul", "flat"]),
    gate_first=st.booleans(),
    act_first=st.booleans(),
    split=st.sampled_from(["chunk", "split", "slice", "narrow"]),
    dropout=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCES)),
)


def check(form: Form, dynamic: bool | None = None) -> FFNMatch:
    """Check that the form's FFN matches, and is what its match says."""
    block, x = FFN(form), hidden(form)
    (traced,) = trace(block, x, dynamic=dynamic)
    matches = match_ffn(traced.graph)
    assert matches.rejected == ()
    (match,) = matches.found
    assert match.activation == SPELLINGS[form.spelling][0]
    assert (match.gate is not None) == (form.kind != "plain")
    has_bias = form.bias or form.layer == "conv1d"
    assert (match.up.bias is not None) == has_bias
    assert (match.down.bias is not None) == (form.down_bias or form.layer == "conv1d")
    assert match.up.transposed == match.down.transposed == (form.layer == "conv1d")
    assert len(match.weights) == len(list(block.parameters()))
    if dynamic is None:
        rebuilt, actual = rebuilt_and_actual(traced, match)
        assert rebuilt.shape == actual.shape
        scale = actual.double().square().mean().sqrt()
        assert (rebuilt - actual).abs().max() <= TOLERANCES[form.dtype] * scale
    return match


@given(FORMS)
def test_every_form_matches_and_is_rebuilt(form: Form) -> None:
    check(form)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("kind", ["plain", "gated"])
def test_every_spelling_of_an_activation(kind: str, spelling: str) -> None:
    check(Form(kind=kind, spelling=spelling))


@pytest.mark.parametrize("kind", ["plain", "fused"])
def test_dynamic_shapes(kind: str) -> None:
    for layer in ("linear", "conv1d", "matmul", "flat"):
        check(Form(kind=kind, spelling="gelu_new", layer=layer), dynamic=True)


@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("split", ["chunk", "split", "slice", "narrow"])
def test_rows_of_a_fused_projection(split: str, gate_first: bool) -> None:
    match = check(Form(kind="fused", spelling="silu", split=split, gate_first=gate_first))
    halves = [(0, 12), (12, 24)]
    assert match.gate is not None
    assert [match.gate.rows, match.up.rows] == (halves if gate_first else halves[::-1])
    assert match.gate.node is match.up.node
    assert match.down.rows is None


def test_a_one_dimensional_hidden_state() -> None:
    check(Form(rank=1))


class WithOnes(FFN):
    """Multiplications by 1 in between, as scaled models have them by default."""

    def inner(self, x: Tensor) -> Tensor:
        gate, up = self.halves(x)
        return 1.0 * (self.act(gate * 1.0) * (up * 1))


def test_multiplication_by_one_is_nothing() -> None:
    (match,) = matches_of(WithOnes(Form(kind="gated")), hidden(Form())).found
    assert match.activation == "gelu"


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize("kind", ["plain", "gated", "fused"])
def test_an_unknown_activation_is_rejected_by_name(kind: str, name: str) -> None:
    functions, act = UNKNOWN[name]
    form = Form(kind=kind)
    refusal = refusal_of(FFN(form, act), hidden(form))
    assert refusal.reason.startswith(f"unknown activation: {functions} (known: gelu, gelu_tanh, ")


@pytest.mark.parametrize("kind", ["plain", "gated"])
def test_an_activation_with_a_parameter_is_rejected(kind: str) -> None:
    form = Form(kind=kind)
    refusal = refusal_of(FFN(form, nn.PReLU()), hidden(form))
    assert refusal.reason.startswith("unknown activation: `prelu` with the parameter `")


def test_no_activation_is_no_ffn() -> None:
    for kind in ("plain", "gated", "fused"):
        matches = matches_of(FFN(Form(kind=kind), nn.Identity()), hidden(Form()))
        assert matches.found == matches.rejected == ()


class Scaled(FFN):
    """SiLU with a slope that is an attribute of the module."""

    slope = 1.0

    def inner(self, x: Tensor) -> Tensor:
        z = self.up(x)
        return z * torch.sigmoid(self.slope * z)


def test_a_symbolic_constant_is_guarded() -> None:
    """With dynamic shapes Dynamo does not guard on floats by itself."""
    block, seen = Scaled(Form()), []

    def record(graph_module: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        seen.append([match.activation for match in match_ffn(graph_module).found])
        return graph_module.forward

    compiled = torch.compile(block, backend=record, dynamic=True)
    with torch.no_grad():
        for slope in (1.0, 1.702, 2.5, 1.0):
            block.slope = slope
            compiled(hidden(Form()))
    assert seen == [["silu"], ["quick_gelu"], []]


class Stack(nn.Module):
    """Blocks one after the other."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Twice(Stack):
    """The first block runs twice, as ALBERT's layers do."""

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](super().forward(x))


def test_names_are_paths_and_a_repeated_module_is_numbered() -> None:
    blocks = FFN(Form()), FFN(Form(kind="gated"))
    matches = matches_of(Twice(*blocks), hidden(Form()))
    assert [m.site for m in matches.found] == ["blocks.0", "blocks.1", "blocks.0#1"]


def test_without_a_module_path_the_ordinal_names_a_site() -> None:
    block = FFN(Form())
    assert [m.site for m in matches_of(block, hidden(Form())).found] == ["ffn.0"]


class Everything(FFN):
    """Attention and FFN in one module: both sites are that module."""

    def __init__(self, form: Form) -> None:
        super().__init__(form)
        self.q, self.k, self.v, self.o = (
            nn.Linear(form.width, form.width, dtype=form.dtype) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        heads = [layer(x)[:, None] for layer in (self.q, self.k, self.v)]
        mixed = F.scaled_dot_product_attention(*heads)[:, 0]
        return super().forward(x + self.o(mixed))


def test_a_name_that_attention_has_gets_a_suffix() -> None:
    (traced,) = trace(Stack(Everything(Form())), hidden(Form()))
    assert MatchAttention()(traced.graph).matched == ("blocks.0",)
    assert [m.site for m in match_ffn(traced.graph).found] == ["blocks.0.ffn"]
