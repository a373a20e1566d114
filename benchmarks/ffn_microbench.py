"""One gated FFN with random weights: dense, kept + folded, and guarded, through Inductor.

    python benchmarks/ffn_microbench.py --tokens 1,512 --threads 2

Every call runs ``--layers`` different FFNs one after the other, so that, as in a model, no layer
finds its weights in a cache. The contenders are timed in turn (A B A B …); medians are printed with
the ratio to dense, and beside it the ratio of bytes (up to 16 tokens) or of multiplications.
Refuses to time what does not pass its numeric check.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from nbl_compiler.lowering.guarded_ffn import reference
from nbl_compiler.lowering.guarded_ffn_inductor import product, register_guarded_ffn
from nbl_compiler.lowering.guarded_fit import fold_slopes
from nbl_compiler.lowering.guarded_site import GuardedFFN
from nbl_compiler.lowering.predictors import fit_low_rank, tensor_bytes
from nbl_compiler.lowering.quantization import fit_quantized
from nbl_compiler.timing import interleaved

# Outputs of these random FFNs are of order 0.1 to 1; a wrong kernel misses by as much.
NUMERIC_TOLERANCE = 1e-4
RANK = 64
# Up to here reading the weights decides, beyond it the multiplications do.
MEMORY_BOUND_TOKENS = 16
# One neuron's g and u must not straddle a rounding: a pick may differ in this share of the tokens.
MAX_DIFFERENT_TOKENS = 0.05


@dataclass(frozen=True)
class Contender:
    """A form of the FFN.

    Args:
        name: What the table calls it.
        layers: One callable per layer, x [tokens, d] to y [tokens, d].
        check: What it must equal: the same computation in plain PyTorch.
        bytes: Read per token at decode.
        products: Multiplications per token at prefill.
    """

    name: str
    layers: tuple[Callable[[Tensor], Tensor], ...]
    check: Callable[[Tensor], Tensor]
    bytes: int
    products: int


def dense_ffn(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """SwiGLU; ``down`` as a model holds it, [d, f]."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def kept_ffn(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, folded: Tensor, bias: Tensor
) -> Tensor:
    """A few dense neurons, and the rest as one map."""
    return dense_ffn(x, gate, up, down) + F.linear(x, folded, bias)


def kept_streamed(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, folded: Tensor, bias: Tensor
) -> Tensor:
    """The same with products that Inductor fuses at a few tokens."""
    hidden = F.silu(product(x, gate, None)) * product(x, up, None)
    return product(hidden, down, None) + product(x, folded, bias)


def dense_streamed(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The dense FFN with such products: what of the gain is theirs."""
    return product(F.silu(product(x, gate, None)) * product(x, up, None), down, None)


def random_site(width: int, neurons: int, capacity: int) -> GuardedFFN:
    """A SwiGLU with random weights, slopes of a half, and the capacity alone to decide."""
    gate, up = torch.randn(2, neurons, width) / width**0.5
    down = torch.randn(neurons, width) / neurons**0.5
    slope = torch.full((neurons,), 0.5)
    site = GuardedFFN(
        gate.clone(), up.clone(), down, None, None, None, torch.zeros(width, width),
        torch.zeros(width), 0.0 * slope, slope, 0.0 * slope, None, None, down.norm(dim=1), [],
        "silu", "none", False, capacity, "truncate", -1.0,
    )  # fmt: skip
    matrix, bias = fold_slopes(site)
    return replace(site, folded=matrix.float(), folded_bias=bias.float())


def contenders(sites: list[GuardedFFN], keep: float) -> list[Contender]:
    """Every form of the same layers."""
    f, d = sites[0].up.shape
    whole = [(s.gate, s.up, s.down.T.contiguous()) for s in sites]
    count = round(keep * f)
    kept = [
        (g[:count].clone(), u[:count].clone(), w[:, :count].clone(), s.folded, s.folded_bias)
        for s, (g, u, w) in zip(sites, whole, strict=True)
    ]
    dense = (4 * 3 * f * d, 3 * f * d)
    fewer = (4 * (3 * count * d + d * d), 3 * count * d + d * d)
    forms = [
        _plain("dense", dense_ffn, dense_ffn, whole, *dense),
        _plain("dense, streamed", dense_streamed, dense_ffn, whole, *dense),
        _plain(f"keep {keep:.0%} + fold", kept_ffn, kept_ffn, kept, *fewer),
        _plain(f"keep {keep:.0%} + fold, streamed", kept_streamed, kept_ffn, kept, *fewer),
    ]
    for name in ("4 bits", "2 bits", f"rank {RANK}"):
        guarded = [_with_predictor(site, name) for site in sites]
        forms.append(_guarded(f"guarded, {name}", guarded))
        if name == "4 bits":  # three times as many for the same gathered bytes
            more = {"values": "predicted", "capacity": 3 * guarded[0].capacity}
            by_prediction = [replace(site, **more) for site in guarded]
            forms.append(_guarded("guarded, 4 bits, predicted values, 3 × capacity", by_prediction))
    return forms


def _plain(
    name: str,
    function: Callable[..., Tensor],
    wanted: Callable[..., Tensor],
    weights: list[tuple[Tensor, ...]],
    read: int,
    products: int,
) -> Contender:
    compiled = torch.compile(function, dynamic=False, fullgraph=True)
    layers = tuple(_bound(compiled, w) for w in weights)
    return Contender(name, layers, lambda x: wanted(x, *weights[0]), read, products)


def _bound(function: Callable[..., Tensor], weights: tuple[object, ...]) -> Callable[..., Tensor]:
    return lambda x: function(x, *weights)


def _guarded(name: str, sites: list[GuardedFFN]) -> Contender:
    site = sites[0]
    f, d = site.up.shape
    slopes = 4 * 4 * f  # two slopes, intercept and norm of every neuron
    gathered = 1 if site.corrects_by_prediction else 3  # rows of d an outlier
    read = tensor_bytes(site.predictor) + 4 * (d * d + gathered * site.selected * d) + slopes

    def call(x: Tensor, *arguments: object) -> Tensor:
        return torch.ops.nbl.guarded_ffn(x, *arguments)[0]

    compiled = torch.compile(call, dynamic=False, fullgraph=True)
    layers = tuple(_bound(compiled, s.arguments()) for s in sites)
    predictor = RANK * (d + 2 * f) if site.predictor_kind == "low_rank" else 2 * f * d
    # Beyond a few tokens all neurons are computed and masked.
    products = gathered * f * d + d * d + predictor
    return Contender(name, layers, lambda x: reference(site, x).output, read, products)


def _with_predictor(site: GuardedFFN, name: str) -> GuardedFFN:
    assert site.gate is not None
    stacked = torch.cat([site.gate, site.up])
    if name.startswith("rank"):
        low_rank = fit_low_rank(stacked, None, RANK)
        return replace(site, predictor=low_rank.tensors, predictor_kind=low_rank.kind)
    quantized = fit_quantized(stacked, None, int(name[0]))
    return replace(site, predictor=quantized.tensors, predictor_kind=quantized.kind)


def check(contender: Contender, x: Tensor) -> None:
    """Refuse to time a contender that does not compute what it should."""
    difference = (contender.layers[0](x) - contender.check(x)).abs().amax(-1)
    wrong = (difference > NUMERIC_TOLERANCE).double().mean()
    allowed = MAX_DIFFERENT_TOKENS if x.shape[0] > 1 else 0.0
    if not bool(difference.isfinite().all()) or wrong > allowed:
        raise SystemExit(
            f"{contender.name}: differs from plain PyTorch by {difference.max():.2e}, not timed"
        )


def measure(forms: list[Contender], x: Tensor, repeats: int) -> list[dict[str, float | str]]:
    """Check and time every form on ``x`` [tokens, d]."""
    for form in forms:
        check(form, x)
        for layer in form.layers:
            layer(x)

    def runner(form: Contender) -> Callable[[], None]:
        def all_layers() -> None:
            for layer in form.layers:
                layer(x)

        return all_layers

    timings = interleaved({form.name: runner(form) for form in forms}, repeats)
    first = forms[0]
    rows: list[dict[str, float | str]] = []
    for form in forms:
        seconds = timings[form.name].median / len(form.layers)
        few = x.shape[0] <= MEMORY_BOUND_TOKENS
        predicted = first.bytes / form.bytes if few else first.products / form.products
        rows.append(
            {
                "form": form.name,
                "tokens": x.shape[0],
                "milliseconds": 1e3 * seconds,
                "speedup": timings[first.name].median / timings[form.name].median,
                "predicted_speedup": predicted,
                "bytes_per_token": form.bytes,
                "spread": timings[form.name].spread,
            }
        )
    return rows


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--neurons", type=int, default=4864)
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--capacity", type=float, default=0.05, help="share of the neurons")
    parser.add_argument("--tokens", default="1,512")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    register_guarded_ffn()
    capacity = round(options.capacity * options.neurons)
    rows: list[dict[str, float | str]] = []
    with torch.no_grad():
        sites = [
            random_site(options.width, options.neurons, capacity) for _ in range(options.layers)
        ]
        for tokens in (int(t) for t in options.tokens.split(",")):
            torch._dynamo.reset()
            x = torch.randn(tokens, options.width)
            rows += measure(contenders(sites, options.keep), x, options.repeats)
    if options.json:
        print(json.dumps(rows))
        return
    table = Table(title=f"d {options.width}, {options.neurons} neurons, SwiGLU, float32")
    for column in ("tokens", "form", "ms", "× dense", "predicted", "MB read", "spread"):
        table.add_column(column, justify="left" if column == "form" else "right")
    for row in rows:
        table.add_row(
            str(row["tokens"]), str(row["form"]), f"{row['milliseconds']:.3f}",
            f"{row['speedup']:.2f}", f"{row['predicted_speedup']:.2f}",
            f"{float(row['bytes_per_token']) / 1e6:.1f}", f"{row['spread']:.0%}",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
