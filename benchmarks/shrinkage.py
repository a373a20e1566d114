"""How attention maps do with little text: the ridge, and what it shrinks towards.

    python benchmarks/shrinkage.py --text calibration.jsonl

Maps with value states of all attention layers, fitted on the first tokens of a text and judged on
its last. Columns: fixed ridges towards zero; the ridge that held-out tokens choose, towards zero;
and what calibration does, which may shrink towards the model's own weights instead.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from decoder_texts import arguments, load
from rich.console import Console
from rich.table import Table
from torch import Tensor

import nbl_compiler as nbl
from nbl_compiler.calibration import observe_model
from nbl_compiler.solvers.attention_prior import attention_prior
from nbl_compiler.solvers.least_squares import LinearFit, fit_linear
from nbl_compiler.solvers.moments import Moments

FIXED = (0.0, 1e-3, 1e-2, 1e-1)


def main() -> None:
    """Print one table: tokens down, ways of shrinking across; median over the layers."""
    parser = arguments(__doc__, tokens=32_768)
    parser.add_argument("--fewer", default="2048,8192", help="the first of them alone")
    parser.add_argument("--test-tokens", type=int, default=16_384)
    args = parser.parse_args()
    counts = [*(int(item) for item in args.fewer.split(",") if item), args.tokens]
    subject = load(args)
    batches = subject.batches(args.tokens + args.test_tokens)
    size = batches[0].numel()
    seen = args.tokens // size
    config = nbl.Config(nbl.Attention(taps=1))

    def sites(some: list[Tensor], held: float) -> Any:
        own = nbl.Config(config.attention, holdout=held)
        return observe_model(subject.model, some, own, solve=False).observation.sites

    test = sites(batches[seen:], 0.0)
    ways = [f"ridge {ridge:g}" for ridge in FIXED] + ["chosen", "chosen, own weights"]
    table = Table("tokens", *ways, title=f"{args.model}: NMSE on other text", title_justify="left")
    for count in counts:
        errors: dict[str, list[float]] = {way: [] for way in ways}
        for name, site in sites(list(islice(batches, max(count // size, 1))), 0.1).items():
            assert site.own is not None
            prior = attention_prior(site.train, site.own.value, site.own.output)
            fits = [fit_linear(site.train, site.holdout, ridge) for ridge in FIXED]
            fits.append(fit_linear(site.train, site.holdout))
            fits.append(fit_linear(site.train, site.holdout, "auto", prior))
            for way, fit in zip(ways, fits, strict=True):
                errors[way].append(_error(fit, test[name].train))
        medians = (float(torch.tensor(errors[way]).median()) for way in ways)
        table.add_row(f"{count:,}", *(f"{value:.3f}" for value in medians))
    Console().print(table)


def _error(fit: LinearFit, moments: Moments) -> float:
    """Return the NMSE of a map on other rows."""
    left = moments.residual(fit.weight)
    offset = left.mean_y - fit.bias
    own = left.centred()
    error = float(own.yy.sum()) / own.count + float(offset.square().sum())
    return error / (float(moments.centred().yy.sum()) / moments.count)


if __name__ == "__main__":
    main()
