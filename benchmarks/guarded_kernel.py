"""The guarded FFN's kernel against a device copy: achieved bytes per second.

    python benchmarks/guarded_kernel.py --width 4096 --neurons 14336 --capacity 0.05

On a GPU this runs the Triton kernels, replayed from CUDA graphs (so launches cost what they cost in
a captured model); without one, the form that Inductor compiles for the CPU. The bytes are those
that must be read: predictor, C, the outliers' rows, and the slopes; at many tokens the whole FFN. A
copy of a large tensor gives the bandwidth of the device, its bytes counted read and written.
Refuses to time what does not pass its numeric check.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from nbl_compiler.lowering.guarded_ffn import dense_output, reference, run
from nbl_compiler.lowering.guarded_ffn_inductor import GATHER_TOKENS, register_guarded_ffn
from nbl_compiler.lowering.guarded_fit import fold_slopes
from nbl_compiler.lowering.guarded_site import GuardedFFN
from nbl_compiler.lowering.predictors import fit_low_rank, tensor_bytes
from nbl_compiler.lowering.quantization import fit_quantized
from nbl_compiler.timing import seconds_of

COPY_BYTES = {"cuda": 2 << 30, "cpu": 256 << 20}
# ‖y − y_ref‖ / ‖y_ref‖: sums in another order; one rounding of y; one of the tiles' residuals too.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
WARM_UP = 3


def random_site(
    width: int, neurons: int, capacity: int, predictor: str, dtype: torch.dtype, device: str
) -> GuardedFFN:
    """A SwiGLU with random weights whose capacity alone decides."""
    gate, up = torch.randn(2, neurons, width, device=device) / width**0.5
    down = torch.randn(neurons, width, device=device) / neurons**0.5
    slope = torch.full((neurons,), 0.5, device=device)
    stacked = torch.cat([gate, up])
    fitted = (
        fit_quantized(stacked, None, int(predictor))
        if predictor in ("2", "4", "8")
        else fit_low_rank(stacked, None, int(predictor.removeprefix("rank")), dtype=dtype)
    )
    site = GuardedFFN(
        gate.to(dtype), up.to(dtype), down.to(dtype), None, None, None,
        torch.zeros(width, width, device=device, dtype=dtype),
        torch.zeros(width, device=device, dtype=dtype), 0.0 * slope, slope, 0.0 * slope, None,
        None, down.norm(dim=1), fitted.tensors, "silu", fitted.kind, False, capacity,
        "truncate", -1.0,
    )  # fmt: skip
    matrix, bias = fold_slopes(site)
    return replace(site, folded=matrix.to(dtype), folded_bias=bias.to(dtype))


def bytes_read(site: GuardedFFN, tokens: int, gathering: int) -> int:
    """Bytes that one call must read: rows per token where tokens gather, else the whole FFN."""
    assert site.gate is not None
    always = tensor_bytes([*site.predictor, site.folded, site.up_slope, site.intercept])
    whole = tensor_bytes([site.gate, site.up, site.down])
    rows = whole // site.neurons * site.selected * tokens
    return always + (min(rows, whole) if tokens <= gathering else whole)


def check(site: GuardedFFN, call: Callable[[], Tensor], x: Tensor) -> float:
    """Return the relative error against the reference.

    Raises:
        SystemExit: if it is too large to be rounding.
    """
    wanted = reference(site, x).output.double()
    error = float((call().double() - wanted).norm() / wanted.norm())
    if not error <= TOLERANCE[x.dtype]:
        raise SystemExit(f"{x.shape[0]} tokens: relative error {error:.1e}, not timed")
    return error


def captured(call: Callable[[], Tensor], device: str) -> Callable[[], object]:
    """The call as a CUDA graph's replay; on the CPU the call itself."""
    for _ in range(WARM_UP):
        call()
    if device == "cpu":
        return call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def median_of(calls: list[Callable[[], object]], repeats: int) -> float:
    """Median seconds of one call, over layers that do not share weights."""

    def all_layers() -> None:
        for call in calls:
            call()

    all_layers()
    return statistics.median(seconds_of(all_layers) for _ in range(repeats)) / len(calls)


def copy_bandwidth(device: str, repeats: int) -> float:
    """Bytes per second of a large copy, read and written bytes together."""
    source = torch.ones(COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES[device] / median_of([lambda: target.copy_(source)], repeats)


def calls_of(
    function: Callable[[GuardedFFN, Tensor], Tensor],
    sites: list[GuardedFFN],
    x: Tensor,
    device: str,
) -> list[Callable[[], Tensor]]:
    """One call per layer: the op as it is on a GPU, compiled by Inductor on a CPU."""
    run_one = function
    if device == "cpu":
        compiled = torch.compile(
            lambda x, *a: function(GuardedFFN(*a), x), dynamic=False, fullgraph=True
        )
        run_one = lambda site, x: compiled(x, *site.arguments())  # noqa: E731
    return [lambda site=site: run_one(site, x) for site in sites]


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--neurons", type=int, default=14336)
    parser.add_argument("--capacity", type=float, default=0.05, help="share of the neurons")
    parser.add_argument("--predictor", default="4", help="2, 4 or 8 bits, or rank64")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default=None)
    parser.add_argument("--tokens", default="1,4,16,512")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, options.dtype or ("bfloat16" if device == "cuda" else "float32"))
    gathering = GATHER_TOKENS
    register_guarded_ffn()
    if device == "cuda":
        from nbl_compiler.lowering.triton_guarded_ffn import DECODE_TOKENS as gathering
    torch.manual_seed(0)
    capacity = round(options.capacity * options.neurons)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU, no GPU here"
    table = Table(title=f"{name}: d {options.width}, {options.neurons} neurons, {dtype}")
    for column in ("tokens", "error", "dense ms", "guarded ms", "MB", "GB/s", "of a copy"):
        table.add_column(column, justify="right")
    with torch.no_grad():
        bandwidth = copy_bandwidth(device, options.repeats)
        sites = [
            random_site(options.width, options.neurons, capacity, options.predictor, dtype, device)
            for _ in range(options.layers)
        ]
        for tokens in (int(t) for t in options.tokens.split(",")):
            torch._dynamo.reset()
            x = torch.randn(tokens, options.width, device=device).to(dtype)
            guarded = calls_of(lambda site, x: run(site, x).output, sites, x, device)
            dense = calls_of(lambda site, x: _dense(site, x), sites, x, device)
            error = check(sites[0], guarded[0], x)
            seconds, dense_seconds = (
                median_of([captured(call, device) for call in calls], options.repeats)
                for calls in (guarded, dense)
            )
            read = bytes_read(sites[0], tokens, gathering)
            table.add_row(
                str(tokens), f"{error:.1e}", f"{1e3 * dense_seconds:.3f}", f"{1e3 * seconds:.3f}",
                f"{read / 1e6:.1f}", f"{read / seconds / 1e9:.1f}",
                f"{read / seconds / bandwidth:.0%}",
            )  # fmt: skip
    Console().print(f"copy: {bandwidth / 1e9:.1f} GB/s, read and written")
    Console().print(table)


def _dense(site: GuardedFFN, x: Tensor) -> Tensor:
    return dense_output(site, x)


if __name__ == "__main__":
    main()
