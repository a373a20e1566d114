"""The observing backend: the compile-time matchers, with an observer at every site.

    y = o_proj(...)      becomes      y = o_proj(...);  observe(site, x, y, residual)

Rows are tokens. Padding is left out, and blocks of tokens chosen by their content go to the
held-out moments, so the split does not depend on batching or on the number of processes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from nbl_compiler.config import Config
from nbl_compiler.errors import CalibrationError, UnsupportedDtypeError
from nbl_compiler.passes.base import Rejected
from nbl_compiler.passes.canonicalize import Canonicalize
from nbl_compiler.passes.graph_tools import shape_of
from nbl_compiler.passes.linearize_attention import SUPPORTED_DTYPES
from nbl_compiler.passes.match_attention import match
from nbl_compiler.passes.private_copy import private_copy
from nbl_compiler.passes.sites import AttentionMatch
from nbl_compiler.solvers.moments import BufferedMoments, Moments

# Tokens a block: long enough that neighbours of held-out tokens are mostly held out too, short
# enough that a few thousand tokens give a useful held-out part.
HOLDOUT_BLOCK = 64


@dataclass
class SiteMoments:
    """What one site's activations added up to."""

    train: Moments
    holdout: Moments
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class Observation:
    """What calibration saw: moments per site in model order, and what was rejected."""

    sites: dict[str, SiteMoments] = field(default_factory=dict)
    rejected: dict[str, Rejected] = field(default_factory=dict)


class _SiteObserver:
    """Receives the rows of one site."""

    def __init__(self, match: AttentionMatch, use_residual: bool) -> None:
        self.details = _details(match)
        self.details["input"] = "residual" if use_residual else "normed"
        self._buffers: tuple[BufferedMoments, BufferedMoments] | None = None

    def add(self, x: Tensor, y: Tensor, stream: Tensor, train: Tensor, holdout: Tensor) -> None:
        width_in, width_out = x.shape[-1], y.shape[-1]
        if self._buffers is None:
            self._buffers = (
                BufferedMoments(width_in, width_out, x.device),
                BufferedMoments(width_in, width_out, x.device, stream=False),
            )
        rows = [t.reshape(-1, t.shape[-1]) for t in (x, y, stream)]
        for chosen, buffer in zip((train, holdout), self._buffers, strict=True):
            if chosen.numel() == rows[0].shape[0]:
                buffer.add(*rows)
            elif chosen.numel():
                buffer.add(*(r.index_select(0, chosen) for r in rows))

    def finish(self) -> SiteMoments:
        assert self._buffers is not None
        train, holdout = (buffer.flush() for buffer in self._buffers)
        self._buffers = None  # Dynamo's cache outlives calibration and must not hold the moments
        return SiteMoments(train, holdout, {**self.details, "tokens": train.count + holdout.count})


class Observer:
    """Holds the observers of all sites; ``backend`` is a Dynamo backend."""

    def __init__(self, config: Config) -> None:
        assert config.attention is not None
        self._use_residual = config.attention.input == "residual"
        self._holdout, self._seed = config.holdout, config.seed
        self._sites: dict[str, _SiteObserver] = {}
        self._rejected: dict[str, Rejected] = {}
        self._rows: dict[tuple[str, int, int], tuple[Tensor, Tensor]] = {}
        self._masks: dict[str, Tensor] = {}
        self._contents: list[Tensor] = []

    def start_batch(self, inputs: Mapping[str, Any]) -> int:
        """Take note of a batch's padding and content before the model runs it.

        Returns:
            The number of tokens that are not padding.
        """
        self._rows.clear()
        names = {"encoder": "attention_mask", "decoder": "decoder_attention_mask"}
        self._masks = {
            side: inputs[name]
            for side, name in names.items()
            if isinstance(inputs.get(name), Tensor) and inputs[name].ndim == 2
        }
        self._contents = [
            value
            for name, value in sorted(inputs.items())
            if isinstance(value, Tensor) and "mask" not in name
        ]
        main = next((v for v in self._contents if v.ndim == 2), None)
        mask = self._masks.get("encoder")
        if mask is not None:
            return int((mask != 0).sum())
        return main.numel() if main is not None else 0

    def backend(
        self, graph_module: GraphModule, example_inputs: Sequence[Any]
    ) -> Callable[..., Any]:
        """Insert an observer behind every matched site and run the graph as it is."""
        del example_inputs
        graph_module = private_copy(graph_module)
        Canonicalize()(graph_module)
        matches = match(graph_module)
        for rejected in matches.rejected:
            self._rejected.setdefault(rejected.site, rejected)
        for found in matches.found:
            self._insert(graph_module, found)
        graph_module.graph.lint()
        graph_module.recompile()
        return graph_module.forward

    def _insert(self, graph_module: GraphModule, found: AttentionMatch) -> None:
        dtype = found.output.meta["example_value"].dtype
        if dtype not in SUPPORTED_DTYPES:
            raise UnsupportedDtypeError(f"{found.site} computes in {dtype}; load it in float32")
        observer = self._sites.get(found.site)
        if observer is None:
            observer = self._sites[found.site] = _SiteObserver(found, self._use_residual)

        def observe(x: Tensor, y: Tensor, stream: Tensor) -> None:
            try:
                observer.add(x, y, stream, *self._split(found.site, x))
            except CalibrationError as error:
                raise CalibrationError(f"{found.site}: {error}; check the model and its dtype") from None

        source = found.residual if self._use_residual else found.hidden
        same = shape_of(found.residual) == shape_of(found.output)
        stream = found.residual if same else found.output
        with graph_module.graph.inserting_after(found.output):
            graph_module.graph.call_function(observe, (source, found.output, stream))

    def _split(self, site: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the indices of training and of held-out rows of a site's [B, T, d] input."""
        batch, length = (x.shape[0], x.shape[1]) if x.ndim == 3 else (1, x.shape[0])
        side = "decoder" if "decoder" in site and "decoder" in self._masks else "encoder"
        key = (side, batch, length)
        if key not in self._rows:
            self._rows[key] = self._choose(batch, length, self._masks.get(side), x.device)
        return self._rows[key]

    def _choose(
        self, batch: int, length: int, mask: Tensor | None, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        real = torch.ones(batch, length, dtype=torch.bool)
        if mask is not None and tuple(mask.shape) == (batch, length):
            real = mask.cpu() != 0
        held = torch.zeros(batch, length, dtype=torch.bool)
        if self._holdout > 0:
            for row in range(batch):
                self._hold_blocks(held[row], real[row], row, length)
        train, holdout = (real & ~held).view(-1), (real & held).view(-1)
        return train.nonzero().view(-1).to(device), holdout.nonzero().view(-1).to(device)

    def _hold_blocks(self, held: Tensor, real: Tensor, row: int, length: int) -> None:
        """Mark the held-out blocks of one row, by a hash of what the row says there."""
        positions = real.nonzero().view(-1)  # blocks are counted from the first real token
        contents = [c[row] for c in self._contents if c.ndim >= 1 and c.shape[0] > row]
        for number, block in enumerate(positions.split(HOLDOUT_BLOCK)):
            state = zlib.crc32(f"{self._seed}:{number}".encode())
            for content in contents:
                aligned = content.ndim == 1 and content.shape[0] == length
                part = content[block.to(content.device)] if aligned else content
                raw = part.detach().cpu().contiguous().view(-1).view(torch.uint8)
                state = zlib.crc32(raw.numpy().tobytes(), state)
            if _uniform(state) < self._holdout:
                held[block] = True

    def finish(self) -> Observation:
        """Return everything seen, with buffers flushed."""
        return Observation(
            {name: site.finish() for name, site in self._sites.items()}, dict(self._rejected)
        )


def _uniform(state: int) -> float:
    """Map a checksum to [0, 1), mixing its bits first (crc32 is linear)."""
    return ((state * 0x9E3779B1) & 0xFFFFFFFF) / 2**32


def _details(found: AttentionMatch) -> dict[str, Any]:
    shapes = [shape_of(weight) or () for weight in found.weights]
    return {"parameters": sum(prod(int(size) for size in shape) for shape in shapes)}
