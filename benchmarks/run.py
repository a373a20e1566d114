"""The benchmark: quality, speed and cost of this package and its peers, into one JSON file.

    python benchmarks/run.py --profile short --out bench.json
    python benchmarks/report.py bench.json

The file is written after every point, and a second run with the same arguments goes on where the
first one ended. ``--only`` takes parts of it: quality, embeddings, speed, growth; ``--models`` some
of the models.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from bench import growth, provenance, quality, speed_points
from bench.contenders import CONTENDERS, Contender
from bench.encoders import encoder
from bench.profiles import PROFILES, Profile
from bench.results import Results, Row
from bench.subjects import Subject, decoder
from peers.does_not_apply import DoesNotApply
from rich.console import Console

from nbl_compiler import speed
from nbl_compiler.errors import NBLError
from nbl_compiler.machine import Probe, Rates
from nbl_compiler.models import MINILM, hidden_size

PARTS = ("quality", "embeddings", "speed", "growth")
console = Console(stderr=True)


def main() -> None:
    """Measure what the file does not have yet."""
    args = _arguments()
    profile: Profile = PROFILES[args.profile]
    args.tokens = args.tokens or profile.tokens
    args.eval_tokens = args.eval_tokens or profile.eval_tokens
    torch.manual_seed(0)
    settings = {
        "text": Path(args.text).name, "eval_text": Path(args.eval_text).name,
        "tokens": args.tokens, "eval_tokens": args.eval_tokens, "seed": 0,
        "machine": provenance.machine(), "versions": provenance.versions(),
    }  # fmt: skip
    about = {"format": provenance.FORMAT, "profile": args.profile}
    results = Results(args.out, settings, about)
    only = args.only.split(",") if args.only else PARTS
    models = args.models.split(",") if args.models else None

    def wanted(name: str) -> bool:
        return models is None or name in models

    loaded = _Loaded(args, profile)
    if "quality" in only:
        for name, parts in profile.quality.items():
            if wanted(name):
                _quality(results, name, parts, lambda n=name: loaded(n), quality.measure)
    if "embeddings" in only and profile.embeddings and wanted(MINILM):
        measure = quality.measure_embeddings
        _quality(results, MINILM, profile.embeddings, lambda: encoder(args), measure)
    if "speed" in only:
        for name, points in profile.speed.items():
            if wanted(name):
                _speed(results, name, points, profile.timed, loaded)
    if "growth" in only:
        _growth(results, profile)
    console.log(f"{len(results.rows)} rows in {args.out}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", default="short", choices=list(PROFILES))
    parser.add_argument("--out", type=Path, required=True, help="the result file")
    parser.add_argument("--text", default="python-docs", help="to calibrate on")
    parser.add_argument("--eval-text", default="python-docs", help="to judge by")
    parser.add_argument("--tokens", type=int, help="to calibrate on; by default the profile's")
    parser.add_argument("--eval-tokens", type=int, help="to judge by; by default the profile's")
    parser.add_argument("--only", help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--models", help="some of the profile's models")
    return parser.parse_args()


class _Loaded:
    """Loads models, one at a time: what was calibrated for quality serves speed as well.

    Args:
        args: Of the command line.
        profile: Says which fractions will be asked for.
    """

    def __init__(self, args: argparse.Namespace, profile: Profile) -> None:
        self._args, self._profile = args, profile
        self._kept: dict[tuple[str, str], Subject] = {}

    def __call__(self, name: str, dtype: str = "float32") -> Subject:
        """Return the model with its text."""
        if (name, dtype) not in self._kept:
            self._kept.clear()
            subject = decoder(name, self._args, dtype)
            self._kept[name, dtype] = replace(subject, most=self._most(name))
        return self._kept[name, dtype]

    def _most(self, name: str) -> float:
        """Return the largest fraction of attention layers that anyone replaces."""
        judged = [
            fraction
            for names, fractions in self._profile.quality.get(name, ())
            for contender in names
            for fraction in fractions
            if CONTENDERS[contender].family == "attention"
        ]
        timed = [point.fraction for point in self._profile.speed.get(name, ())]
        return max([*judged, *timed], default=0.0)


def _quality(
    results: Results,
    model: str,
    parts: Sequence[tuple[Sequence[str], Sequence[float]]],
    load: Callable[[], Subject],
    measure: Callable[[Contender, Subject, float], Row],
) -> None:
    """Measure contenders one by one; the model is loaded when the first one is missing."""
    subject = functools.cache(load)
    for contender, fraction in _pairs(parts):

        def make(contender: Contender = contender, fraction: float = fraction) -> Row:
            try:
                row = measure(contender, subject(), fraction)
            except (DoesNotApply, NBLError) as reason:
                row = quality.names(contender, subject(), fraction) | {"skipped": str(reason)}
            contender.forget(subject(), fraction)
            return row

        _log(_once(results, f"quality/{model}/{contender.name} {fraction:g}", make))


def _pairs(
    parts: Iterable[tuple[Sequence[str], Sequence[float]]],
) -> list[tuple[Contender, float]]:
    return [(CONTENDERS[name], f) for names, shares in parts for f in shares for name in names]


def _speed(
    results: Results,
    model: str,
    points: Sequence[speed_points.Point],
    timed: Sequence[str],
    load: Callable[[str, str], Subject],
) -> None:
    """Measure points; the machine's rates are probed in the rounds of each."""
    rates: dict[str, Rates] = {}

    def rates_of(subject: Subject, dtype: str) -> Rates:
        if dtype not in rates:
            rates[dtype] = Probe(
                hidden_size(subject.model), codes=True, dtype=getattr(torch, dtype)
            )
        return rates[dtype]

    for number, point in enumerate(points):
        who = [CONTENDERS[name] for name in timed if point.only is None or name in point.only]
        names = [point.name(model, contender) for contender in who]
        if all(name in results.rows for name in names):
            continue
        subject = load(model, point.dtype)
        make = functools.partial(_point, point, subject, who, rates_of(subject, point.dtype))
        for row in results.group(names, make).values():
            _log(row)
        after = points[number + 1 : number + 2]
        if not after or after[0].fraction != point.fraction:  # what is made takes gigabytes
            for contender in who:
                contender.forget(subject, point.fraction_of(contender))


def _point(
    point: speed_points.Point, subject: Subject, who: Sequence[Contender], rates: Rates
) -> dict[str, Row]:
    with speed.measuring():
        rows = speed_points.measure(point, subject, who, rates)
    return {name: _stamped(row) for name, row in rows.items()}


def _growth(results: Results, profile: Profile) -> None:
    for point in profile.calibration:
        _log(_once(results, point.name, lambda p=point: growth.calibration(p)))
    rates: list[Rates] = []
    for shape, counts in profile.layers.items():
        for layers in counts:

            def make(shape: str = shape, layers: int = layers) -> Row:
                if not rates:
                    rates.append(Probe())
                with speed.measuring():
                    return growth.compilation(shape, layers, 512, rates[0])

            _log(_once(results, growth.compilation_name(shape, layers, 512), make))


def _once(results: Results, name: str, make: Callable[[], Row]) -> Row:
    return results.row(name, lambda: _stamped(make()))


def _stamped(row: Row) -> Row:
    return {**row, "revision": provenance.revision()}


def _log(row: Row) -> None:
    """Say what came out."""
    about = " ".join(
        str(row[key])
        for key in ("model", "dtype", "phase", "context", "batch", "contender", "fraction", "what",
                    "width", "layers")
        if key in row
    )  # fmt: skip
    if "skipped" in row:
        console.log(f"{about}: skipped, {row['skipped']}")
        return
    shown = ", ".join(f"{name} {ratio['value']:.3f}" for name, ratio in row["ratios"].items())
    console.log(f"{about}: {shown}")


if __name__ == "__main__":
    main()
