"""One linear layer with random weights, floats and int8, each in two ways, through Inductor.

    python benchmarks/quantized_linear.py --tokens 1,4,16 --threads 2

``linear`` is what Inductor makes of ``F.linear``; on a torchao weight that converts the matrix into
a buffer at every call. ``streamed`` is the loop that ``backend="nbl"`` makes of it for few tokens.
Every call runs ``--layers`` different layers, so that no matrix is found in a cache; the contenders
take turns, and medians are printed. Refuses to time what does not pass its numeric check.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchao.quantization import Int8Tensor, PerRow

from nbl_compiler.int8_weights import int8_of
from nbl_compiler.lowering.int8_linear import streamed_int8_linear
from nbl_compiler.lowering.streamed_linear import streamed_product
from nbl_compiler.lowering.widened import register_widened
from nbl_compiler.timing import interleaved

# Of the largest output: float32 sums in another order; bfloat16 rounds twice.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-6}

Layers = Callable[[Tensor], list[Tensor]]


def contenders(weights: Sequence[Tensor]) -> dict[str, tuple[Layers, Sequence[Tensor]]]:
    """Return name → (the layers, the matrices that they stand for)."""
    held = [Int8Tensor.from_hp(weight, granularity=PerRow()) for weight in weights]
    parts = [int8_of(weight, "a weight") for weight in held]
    meant = [part.dequantized() for part in parts]
    exact = [weight.float() for weight in weights]
    pairs = [(part.codes, part.scale) for part in parts]
    return {
        "linear": (_compiled(F.linear, [(w,) for w in weights]), exact),
        "streamed": (_compiled(_streamed, [(w,) for w in weights]), exact),
        "int8 linear (torchao)": (_compiled(F.linear, [(w,) for w in held]), meant),
        "int8 streamed": (_compiled(streamed_int8_linear, pairs), meant),
    }


def _streamed(x: Tensor, weight: Tensor) -> Tensor:
    return streamed_product(x, weight, None)


def _compiled(layer: Callable[..., Tensor], operands: Sequence[tuple[Tensor, ...]]) -> Layers:
    def run(x: Tensor, given: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
        return [layer(x, *each) for each in given]

    compiled = torch.compile(run, dynamic=False)
    return lambda x: compiled(x, operands)


def check(made: Sequence[Tensor], x: Tensor, matrices: Sequence[Tensor]) -> None:
    """Refuse to time layers that do not compute what their matrices say."""
    for one, matrix in zip(made, matrices, strict=True):
        exact = F.linear(x.float(), matrix)
        error = (one.float() - exact).abs().max() / exact.abs().max()
        if error > TOLERANCES[x.dtype]:
            raise SystemExit(f"a layer is off by {float(error):.2g} of its largest output")


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4864)
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", default="1,4,16")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    register_widened()
    dtype = getattr(torch, given.dtype)
    shape = (given.layers, given.rows, given.width)
    weights = (torch.randn(shape) / given.width**0.5).to(dtype).unbind()
    table = Table(
        title=f"{given.rows} × {given.width}, {given.dtype}, µs a layer (of float linear)"
    )
    table.add_column("tokens", justify="right")
    with torch.inference_mode():
        for tokens in map(int, given.tokens.split(",")):
            torch._dynamo.reset()
            x = torch.randn(tokens, given.width).to(dtype)
            forms = contenders(weights)
            for run, matrices in forms.values():
                check(run(x), x, matrices)
            calls = {name: partial(run, x) for name, (run, _) in forms.items()}
            timing = interleaved(calls, given.repeats)
            base = timing["linear"].median
            if len(table.columns) == 1:
                for name in timing:
                    table.add_column(name, justify="right")
            table.add_row(
                str(tokens),
                *(
                    f"{1e6 * t.median / given.layers:.0f} ({t.median / base:.2f})"
                    for t in timing.values()
                ),
            )
    Console().print(table)


if __name__ == "__main__":
    main()
