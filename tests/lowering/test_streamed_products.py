"""Products for a few tokens, as sums: floats, bytes of codes, int8."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from nbl_compiler.lowering.lower import lower
from nbl_compiler.lowering.predictors import pack
from nbl_compiler.lowering.streamed_codes import code_sums, int8_sums
from nbl_compiler.lowering.streamed_linear import LONGEST_SUM, stream_tokens, streamed_linear

# Float32 sums of some thousand products in another order, relative to the sum of magnitudes.
ROUNDING = 1e-6


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_sums(made: Tensor, x: Tensor, matrix: Tensor) -> None:
    exact = x.double() @ matrix.double().T
    scale = x.double().abs() @ matrix.double().abs().T
    assert made.dtype == torch.float32
    assert made.shape == exact.shape
    assert ((made.double() - exact).abs() <= ROUNDING * scale).all()


def inductor(function, *given: Tensor) -> Tensor:
    return lower(make_fx(function)(*given), list(given))(*given)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("width", [64, 63, 61, 4])
def test_codes(bits: int, width: int) -> None:
    """Whole words, bytes that fill no word, and columns that fill no byte; every code occurs."""
    codes = torch.randint(0, 2**bits, (37, width), generator=generator(bits), dtype=torch.uint8)
    codes[0], codes[1] = 2**bits - 1, 0
    x = torch.randn(3, width, generator=generator(width))
    assert_sums(code_sums(x, pack(codes, bits), bits), x, codes)


@pytest.mark.parametrize("width", [64, 63])
def test_int8(width: int) -> None:
    codes = torch.randint(-128, 128, (37, width), generator=generator(0), dtype=torch.int8)
    codes[0], codes[1], codes[2] = -128, 127, 0
    x = torch.randn(3, width, generator=generator(width))
    assert_sums(int8_sums(x, codes), x, codes)
    every_second = codes.repeat_interleave(2, 0)[::2]
    assert_sums(int8_sums(x, every_second), x, codes)


@pytest.mark.parametrize("tokens", [1, 3])
def test_codes_by_inductor(tokens: int) -> None:
    x = torch.randn(tokens, 64, generator=generator(0))
    codes = torch.randint(0, 16, (63, 64), generator=generator(1), dtype=torch.uint8)
    made = inductor(lambda x, packed: code_sums(x, packed, 4), x, pack(codes, 4))
    assert_sums(made, x, codes)
    signed = torch.randint(-128, 128, (63, 64), generator=generator(2), dtype=torch.int8)
    assert_sums(inductor(int8_sums, x, signed), x, signed)


@pytest.mark.parametrize("width", [60, 2 * LONGEST_SUM + 2, LONGEST_SUM + 3])
def test_floats_by_inductor(width: int) -> None:
    """Short rows, rows in two parts, and rows of a prime length, which are not cut."""
    x = torch.randn(3, width, generator=generator(0))
    weight = torch.randn(17, width, generator=generator(1))
    assert_sums(streamed_linear(x, weight), x, weight)
    assert_sums(inductor(lambda x, weight: streamed_linear(x, weight), x, weight), x, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_shape_and_dtype(dtype: torch.dtype) -> None:
    """Below and above the limit, [..., d]; y in the dtype of x, rounded once."""
    weight, bias = (
        torch.randn(*shape, generator=generator(0)).to(dtype) for shape in ((21, 64), (21,))
    )
    above = torch.randn(stream_tokens(dtype) + 1, 64, generator=generator(2)).to(dtype)
    assert torch.equal(streamed_linear(above, weight, bias), F.linear(above, weight, bias))
    for shape in ((64,), (1, 64), (2, 2, 64)):
        x = torch.randn(*shape, generator=generator(1)).to(dtype)
        exact = F.linear(x.double(), weight.double(), bias.double())
        made = streamed_linear(x, weight, bias)
        assert made.dtype == dtype
        # A rounding to dtype, and float32 sums of 64 products of order one.
        step = torch.finfo(dtype).eps
        torch.testing.assert_close(made.double(), exact, rtol=step, atol=1e-5)


def test_a_row_is_loaded_once_for_all_tokens() -> None:
    """What makes it fast: one loop, whose body reads the matrix once and sums for every token."""
    from torch._inductor.utils import run_and_get_code

    x, weight = torch.randn(4, 64), torch.randn(128, 64)
    with torch.no_grad():
        compiled = torch.compile(streamed_linear, dynamic=False)
        _, (code,) = run_and_get_code(compiled, x, weight)
    (loop,) = [part for part in code.split("omp for") if "128L" in part and "tmp_acc3" in part]
    assert loop.count("tmp_acc3_vec = tmp_acc3_vec +") == 1
    assert "transpose_mxn" not in code
