"""What rates a machine sustains, measured on layers like those of a model.

The probes are chains of products as a decoder has them, d → 2 d → d, with more weights than any
cache holds. Small matrices are read more slowly than large ones, and a shared machine has good and
bad minutes: so the probes have the model's width, and take turns with what is timed beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from nbl_compiler.cost import Machine
from nbl_compiler.lowering.int8_linear import streamed_int8_linear
from nbl_compiler.lowering.lower import lower
from nbl_compiler.lowering.streamed_linear import streamed_linear
from nbl_compiler.timing import median_seconds

NUMBERS = 2**25
"""Weights of a probe, 128 MiB in float32: more than any cache."""
CODE_NUMBERS = 2**23
"""Weights of the probe of codes, whose unpacking takes longer than their reading."""
BLOCK = 256
"""Tokens of the probe of arithmetic."""
LEAST_WIDTH = 512
"""Narrower ones would take a chain of thousands of layers, and its compilation."""
_EXPANSION = 2

READ, COMPUTE, STREAM, CODES = "probe: read", "probe: compute", "probe: stream", "probe: codes"


class Rates(Protocol):
    """What is timed beside other calls to know a machine's rates just then."""

    @property
    def calls(self) -> Mapping[str, Callable[[], object]]:
        """Name → what to time; warm."""

    def machine(self, seconds: Mapping[str, float]) -> Machine:
        """Return the rates, of the calls' seconds by name."""


@dataclass
class Probe:
    """Calls whose seconds tell a machine's rates (on the CPU; made in seconds).

    Args:
        width: d, the model's hidden size (at least ``LEAST_WIDTH`` is taken).
        streamed: Also probe ``streamed_linear``, which has to be compiled for it (seconds).
        codes: Also probe layers of int8 weights, likewise.
        dtype: Of weights and activations.
    """

    width: int = 1024
    streamed: bool = True
    codes: bool = False
    dtype: torch.dtype = torch.float32
    calls: dict[str, Callable[[], object]] = field(init=False, repr=False)
    """Name → what to time; warm."""

    def __post_init__(self) -> None:
        d = max(self.width, LEAST_WIDTH)
        wide = _EXPANSION * d
        pairs = max(NUMBERS // (2 * d * wide), 1)
        self._numbers = 2 * d * wide * pairs
        generator = torch.Generator().manual_seed(0)  # a user's own state stays as it is

        def random(rows: int, columns: int) -> Tensor:
            numbers = torch.randn(rows, columns, generator=generator)
            return (numbers / sqrt(columns)).to(self.dtype)

        weights = [w for _ in range(pairs) for w in (random(wide, d), random(d, wide))]
        token, block = random(1, d), random(BLOCK, d)

        def plain(x: Tensor) -> Tensor:
            return _chain(F.linear, x, *weights)

        self.calls = {READ: lambda: plain(token), COMPUTE: lambda: plain(block)}
        with torch.no_grad():
            if self.streamed:
                stream = _compiled(streamed_linear, token, weights)
                self.calls[STREAM] = lambda: stream(token, *weights)
            if self.codes:
                few = max(CODE_NUMBERS // (2 * d * wide), 1)
                self._codes = 2 * d * wide * min(few, pairs)
                codes = [torch.randint(-127, 128, w.shape, generator=generator).to(torch.int8)
                         for w in weights[: 2 * few]]  # fmt: skip
                unpack = _compiled(_int8_layer, token, codes)
                self.calls[CODES] = lambda: unpack(token, *codes)
            for call in self.calls.values():
                call()

    def machine(self, seconds: Mapping[str, float]) -> Machine:
        """Return the rates.

        Args:
            seconds: Of the calls, by name.
        """
        read = self._numbers * self.dtype.itemsize
        return Machine(
            read / seconds[READ],
            2 * self._numbers * BLOCK / seconds[COMPUTE],
            read / seconds[STREAM] if self.streamed else 0.0,
            self._codes / seconds[CODES] if self.codes else 0.0,
        )


def measure_machine(
    repeats: int = 9,
    width: int = 1024,
    *,
    streamed: bool = True,
    codes: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Machine:
    """Measure this machine's rates (CPU; takes seconds).

    Args:
        repeats: Medians of this many runs.
        width: As for ``Probe``, as are ``streamed``, ``codes`` and ``dtype``.
        streamed: See there.
        codes: See there.
        dtype: See there.
    """
    probe = Probe(width, streamed, codes, dtype)
    with torch.no_grad():
        return probe.machine({n: median_seconds(call, repeats) for n, call in probe.calls.items()})


def _chain(linear: Callable[[Tensor, Tensor], Tensor], x: Tensor, *weights: Tensor) -> Tensor:
    for up, down in zip(weights[::2], weights[1::2], strict=True):
        x = x + linear(linear(x, up), down)
    return x


def _int8_layer(x: Tensor, codes: Tensor) -> Tensor:
    scale = torch.full(codes.shape[:1], 1 / (128 * sqrt(codes.shape[1])))
    return streamed_int8_linear(x, codes, scale)


def _compiled(
    linear: Callable[[Tensor, Tensor], Tensor], x: Tensor, weights: list[Tensor]
) -> Callable[..., object]:
    """Return the chain, compiled without Dynamo: its resets do not reach it."""
    graph_module = make_fx(lambda *given: _chain(linear, *given))(x, *weights)
    return lower(graph_module, [x, *weights])
