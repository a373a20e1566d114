"""Linear layers of int8 matrices against the same with the matrix dequantized."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchao.quantization import Int8Tensor, PerRow

from nbl_compiler.int8_weights import Int8Matrix, quantize_rows, stacked
from nbl_compiler.lowering.int8_linear import (
    int8_linear,
    int8_stream_tokens,
    streamed_int8_linear,
)
from nbl_compiler.lowering.widened import register_widened

ROWS, WIDTH = 63, 60
# Float32 sums of 60 products, relative to the largest output.
ROUNDING = 2e-6
# Half a unit in the last place for the result, and in a matrix product as much for the sum before
# the scale (of float16: for the matrix).
STEPS = {torch.float32: ROUNDING, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def matrix(rows: int = ROWS, seed: int = 0) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def operands(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Int8Matrix, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, WIDTH, generator=generator).to(dtype)
    return x, quantize_rows(matrix()), torch.randn(ROWS, generator=generator).to(dtype)


def assert_right(result: Tensor, x: Tensor, held: Int8Matrix, bias: Tensor) -> None:
    exact = F.linear(x.double(), held.dequantized().double(), bias.double())
    assert result.dtype == x.dtype
    error = (result.double() - exact).abs().max()
    assert error <= STEPS[x.dtype] * exact.abs().max()


@pytest.mark.parametrize("dtype", STEPS)
@pytest.mark.parametrize("tokens", [1, 8, 63])
def test_both_forms(tokens: int, dtype: torch.dtype) -> None:
    x, held, bias = operands(tokens, dtype)
    for form in (int8_linear, streamed_int8_linear):
        assert_right(form(x, held.codes, held.scale, bias), x, held, bias)
        without = form(x[None], held.codes, held.scale)
        assert without.shape == (1, tokens, ROWS)
        zero = torch.zeros_like(bias)
        assert_right(without[0], x, held, zero)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inductor(dtype: torch.dtype) -> None:
    register_widened()
    compiled = torch.compile(streamed_int8_linear, dynamic=False)
    for tokens in (1, int8_stream_tokens(dtype)):
        x, held, bias = operands(tokens, dtype)
        assert_right(compiled(x, held.codes, held.scale, bias), x, held, bias)


def test_float16_does_not_overflow() -> None:
    """Codes of 127 on large inputs sum to more than float16 holds; the result does not."""
    x = torch.full((20, WIDTH), 100.0, dtype=torch.float16)
    held = quantize_rows(torch.full((ROWS, WIDTH), 0.01))
    made = int8_linear(x, held.codes, held.scale)
    torch.testing.assert_close(made.float(), torch.full((20, ROWS), 60.0), rtol=5e-3, atol=0)


def test_rounding_is_torchaos() -> None:
    given = matrix()
    theirs, own = Int8Tensor.from_hp(given, granularity=PerRow()), quantize_rows(given)
    assert torch.equal(theirs.qdata, own.codes)
    assert torch.equal(theirs.scale.flatten(), own.scale)
    assert torch.equal(theirs.dequantize(), own.dequantized())


def test_the_rounding_error() -> None:
    """Uniform within a step, 1/127.5 of the row's greatest: ‖E‖² = Σ step²/12."""
    given = matrix()
    error = given - quantize_rows(given).dequantized()
    step = given.abs().amax(1, keepdim=True) / 127.5
    assert (error.abs() <= 0.5001 * step).all()
    expected = (step.square().sum() * WIDTH / 12).sqrt()
    assert abs(error.norm() / expected - 1) < 0.05


def test_rows_of_zeros() -> None:
    held = quantize_rows(torch.zeros(3, WIDTH))
    assert torch.equal(held.dequantized(), torch.zeros(3, WIDTH))


def test_rows_and_stacks_are_bit_for_bit() -> None:
    first, second = quantize_rows(matrix()), quantize_rows(matrix(5, seed=1))
    both = stacked([first.rows(torch.tensor([4, 0])), second])
    expected = torch.cat([first.dequantized()[[4, 0]], second.dequantized()])
    assert torch.equal(both.dequantized(), expected)
