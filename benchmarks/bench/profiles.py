"""What a short run, a sweep over decode, and a long run measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

from bench.growth import Calibration
from bench.speed_points import DENSE, Point

ATTENTION = ("attention dropped", "NBL, published", "NBL", "value taps", "mixed values")
PRUNING = ("magnitude", "FLAP", "Wanda", "RIA", "TEAL", "CATS")
FOLDED = ("keep+fold", "guarded", "guarded, predicted values")
TIMED = (
    "dense eager", DENSE, "empty plan", "attention dropped", "NBL", "value taps", "mixed values",
    "magnitude", "keep+fold", "guarded", "int8", "int8 + plan",
)  # fmt: skip


@dataclass(frozen=True)
class Profile:
    """One length of the benchmark.

    Args:
        quality: Model → (contenders, fractions), in turn.
        embeddings: (contenders, fractions) for MiniLM's sentence embeddings.
        speed: Model → points.
        timed: Who takes part in them.
        calibration: Points of calibration's cost.
        layers: Numbers of layers to compile.
        tokens: To calibrate on.
        eval_tokens: To judge by.
    """

    quality: Mapping[str, Sequence[tuple[Sequence[str], Sequence[float]]]]
    embeddings: Sequence[tuple[Sequence[str], Sequence[float]]]
    speed: Mapping[str, Sequence[Point]]
    timed: Sequence[str] = TIMED
    calibration: Sequence[Calibration] = ()
    layers: Mapping[str, Sequence[int]] = field(default_factory=dict)
    tokens: int = 8_192
    eval_tokens: int = 2_048


_GEMMA, _QWEN, _LLAMA = "gemma-3-270m", "qwen2.5-0.5b-shape", "llama-3.2-1b-shape"

_FEW = (DENSE, "empty plan", "attention dropped", "mixed values", "keep+fold", "guarded")
# Compiling a point takes most of a minute for each contender.
_FEWER = (DENSE, "mixed values", "keep+fold", "guarded")
_STEP = Point("decode", 2048, repeats=5)

SHORT = Profile(
    quality={
        _GEMMA: [
            (("attention dropped", "mixed values"), (0.125,)),
            (("FLAP",), (0.5,)),
            (("guarded",), (0.8,)),
        ]
    },
    embeddings=[(("keep+fold",), (0.8,))],
    speed={
        _QWEN: [
            _STEP,
            # Guards are for decode.
            Point("prefill", 512, repeats=3, only=(DENSE, "mixed values", "keep+fold")),
        ],
    },
    timed=_FEWER,
    tokens=4_096,
)


SWEEP = Profile(
    quality={},
    embeddings=[],
    speed={
        _QWEN: [
            *(Point("decode", context) for context in (128, 512)), _STEP, Point("decode", 8192),
            *(Point("decode", 512, batch) for batch in (4, 16)),
        ]
    },
    timed=_FEW,
    calibration=[Calibration(640, 4_096, layers=24, rounds=1)],
)  # fmt: skip
"""Decode alone, over contexts and batches, by those of the short form and two more."""


QUALITY = Profile(
    quality={
        _GEMMA: [
            (ATTENTION, (0.25,)),
            ((*PRUNING, "keep+fold"), (0.5,)),
            (("guarded", "guarded, predicted values"), (0.8,)),
            (("int8",), (0.0,)),
            (("int8 + plan",), (0.25,)),
        ]
    },
    embeddings=[
        ((*PRUNING, "keep+fold"), (0.5,)),
        (("TARDIS, published", "guarded", "guarded, predicted values"), (0.8,)),
        (("int8",), (0.0,)),
    ],
    speed={},
)
"""Everyone's quality, each at one fraction."""


def _sweep(prompts: Sequence[int]) -> list[Point]:
    """Return decode over contexts, batches and fractions, prefill over prompts, and bfloat16.

    Points of one fraction and dtype stand together: what contenders are made of is kept between
    them. Where a CPU has no instructions for bfloat16, long prompts would take hours.
    """
    points = [Point("decode", context) for context in (128, 512, 2048, 8192)]
    points += [Point("decode", 512, batch) for batch in (4, 16)]
    points += [Point("prefill", length, repeats=3 if length <= 2048 else 1) for length in prompts]
    points += [Point("prefill", 128, 16, repeats=3)]
    points += [Point("decode", 2048, fraction=fraction) for fraction in (0.25, 0.75)]
    points += [Point("decode", 512, dtype="bfloat16")]
    return [*points, Point("prefill", 128, dtype="bfloat16", repeats=3)]


LONG = Profile(
    quality={
        _GEMMA: [
            (ATTENTION, (0.125, 0.25, 0.5)),
            ((*PRUNING, *FOLDED), (0.5, 0.8)),
            (("TARDIS, published",), (0.9,)),
            (("int8",), (0.0,)),
            (("int8 + plan",), (0.25,)),
        ]
    },
    embeddings=[
        ((*PRUNING, *FOLDED), (0.5, 0.8)),
        (("TARDIS, published",), (0.65, 0.8, 0.9)),
        (("int8",), (0.0,)),
    ],
    speed={
        _GEMMA: [
            Point(p, c, fraction=f) for p, f, c in product(("decode",), (0.25, 0.5), (512, 4096))
        ],
        _QWEN: _sweep((128, 512, 2048, 8192)),
        _LLAMA: _sweep((128, 512, 2048)),
    },
    calibration=[
        *(Calibration(640, tokens) for tokens in (6_144, 24_576, 49_152)),
        *(Calibration(width, 24_576) for width in (256, 1024, 1536)),
        *(Calibration(640, 4_096, layers) for layers in (12, 24)),
    ],
    layers={_QWEN: (3, 6, 12, 24)},
    tokens=32_768,
    eval_tokens=8_192,
)

TINY = Profile(
    quality={
        "tiny": [
            (("attention dropped", "NBL, published", "NBL", "value taps"), (0.25, 0.5)),
            (("magnitude", "FLAP", "Wanda", "RIA", "TEAL", "CATS"), (0.5,)),
            (("TARDIS, published",), (0.9,)),
            (("keep+fold", "guarded"), (0.5,)),
            (("int8",), (0.0,)),
        ]
    },
    embeddings=[],
    speed={
        "tiny-shape": [
            Point("decode", 128, repeats=3),
            Point("prefill", 128, batch=2, repeats=3),
        ],
        "tiny": [Point("decode", 64, batch=2, repeats=3, fraction=0.25)],
    },
    timed=("dense eager", DENSE, "empty plan", "attention dropped", "NBL", "keep+fold"),
    calibration=[Calibration(128, 2_048, rounds=2)],
    layers={"tiny-shape": (2, 4)},
    tokens=2_048,
    eval_tokens=512,
)
"""Runs in minutes, says nothing: to see that everything works."""

PROFILES = {"short": SHORT, "sweep": SWEEP, "quality": QUALITY, "long": LONG, "tiny": TINY}
