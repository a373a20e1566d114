"""The observing backend: the compile-time matchers, with an observer at every site.

    y = o_proj(...)      becomes      y = o_proj(...);  observe(x, y, residual)

Rows are tokens; ``nbl_compiler.rows`` says which of them count. ``nbl_compiler.observe_ffn`` does
the same for FFN sites.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from nbl_compiler.config import Config
from nbl_compiler.errors import CalibrationError, UnsupportedDtypeError
from nbl_compiler.ffn.sites import FFNSite
from nbl_compiler.ffn.stages import Stage
from nbl_compiler.fingerprint import Sketch, sketch
from nbl_compiler.looking import Looking
from nbl_compiler.lowering.value_states import looks_back
from nbl_compiler.observe_ffn import FFNObservers
from nbl_compiler.observe_gates import refuse_spread
from nbl_compiler.passes.base import Rejected
from nbl_compiler.passes.canonicalize import Canonicalize
from nbl_compiler.passes.collectives import without_collectives
from nbl_compiler.passes.emit_states import emit_input
from nbl_compiler.passes.graph_tools import Topology, shape_of
from nbl_compiler.passes.match_attention import MatchAttention
from nbl_compiler.passes.own_weights import OwnWeights, joined, own_weights
from nbl_compiler.passes.private_copy import private_copy
from nbl_compiler.passes.rewrite_sites import SUPPORTED_DTYPES
from nbl_compiler.passes.sites import AttentionMatch, load_matches
from nbl_compiler.passes.value_path import value_weights
from nbl_compiler.rows import RowChooser
from nbl_compiler.several_processes import ALONE, Failure, Share
from nbl_compiler.solvers.moments import BufferedMoments, Moments
from nbl_compiler.tensor_parallel import is_spread
from nbl_compiler.user_errors import reported_by_dynamo
from nbl_compiler.value_states import NO_STATES, Gates, States


@dataclass
class SiteMoments:
    """What one site's activations added up to.

    Args:
        train: Moments of the rows to fit.
        holdout: Moments of the held-out rows.
        states: Value states that stand behind the map's own input in the rows of x.
        own: The site's own value and output weights, where they are known.
        details: Plain facts about the site, for the plan.
        weights: Sketches of the weights that the site's region reads.
        gates: Of mixed values, if ``states`` has such.
    """

    train: Moments
    holdout: Moments
    states: States = NO_STATES
    own: OwnWeights | None = None
    details: dict[str, Any] = field(default_factory=dict)
    weights: tuple[Sketch, ...] = ()
    gates: Gates | None = None


@dataclass
class Observation:
    """What calibration saw.

    Args:
        sites: Moments of every attention site, in model order.
        rejected: Attention sites that were rejected.
        ffn: The same of FFN sites, if they were observed.
    """

    sites: dict[str, SiteMoments] = field(default_factory=dict)
    rejected: dict[str, Rejected] = field(default_factory=dict)
    ffn: FFNObservers | None = None


class _SiteObserver:
    """Receives the rows of one site."""

    def __init__(
        self,
        details: dict[str, Any],
        weights: tuple[Sketch, ...],
        states: States,
        own: OwnWeights | None,
        gates: Gates | None,
    ) -> None:
        self._details, self._weights, self._own, self._gates = details, weights, own, gates
        self.states, self._looks_back = states, True
        self._buffers: tuple[BufferedMoments, BufferedMoments] | None = None

    def check_mask(self, mask: Tensor, split: tuple[Tensor, Tensor]) -> None:
        """Take note of whether all tokens that count attend to what came before, and no more."""
        whole = looks_back(mask)
        for chosen in split:
            row, token = chosen // whole.shape[1], chosen % whole.shape[1]
            fine = whole[row if whole.shape[0] > 1 else torch.zeros_like(row), token]
            self._looks_back = self._looks_back and bool(fine.all())

    def add(self, x: Tensor, y: Tensor, stream: Tensor, split: tuple[Tensor, Tensor]) -> None:
        width_in, width_out = x.shape[-1], y.shape[-1]
        if self._buffers is None:
            self._buffers = (
                BufferedMoments(width_in, width_out, x.device),
                BufferedMoments(width_in, width_out, x.device, stream=False),
            )
        rows = [t.reshape(-1, t.shape[-1]) for t in (x, y, stream)]
        for chosen, buffer in zip(split, self._buffers, strict=True):
            if chosen.numel() == rows[0].shape[0]:
                buffer.add(*rows)
            elif chosen.numel():
                buffer.add(*(r.index_select(0, chosen) for r in rows))

    def finish(self) -> SiteMoments:
        assert self._buffers is not None
        train, holdout = (buffer.flush() for buffer in self._buffers)
        details = {**self._details, "tokens": train.count + holdout.count}
        states = self.states
        if states and not self._looks_back:
            details["no_states"] = "its attention is not causal"
            own = torch.arange(details["width_in"], device=train.xx.device)
            train, holdout, states = train.of_inputs(own), holdout.of_inputs(own), NO_STATES
        gates = self._gates if states.mixed else None
        return SiteMoments(train, holdout, states, self._own, details, self._weights, gates)

    def release(self) -> None:
        self._buffers = None


class Observer(Looking[Observation]):
    """Holds the observers of all sites; ``backend`` is a Dynamo backend.

    Args:
        config: Says which input to observe and how much to hold out.
        attention: Whether to observe attention sites.
        begin_ffn: Makes the stage of an FFN site (see ``FFNObservers``); None leaves them alone.
        rows: Which of the rows this process takes. The others are taken by processes that run the
            same model together with this one.
        gates: Site name → the gates of its mixed values; a site without reads none.
    """

    def __init__(
        self,
        config: Config,
        *,
        attention: bool = True,
        begin_ffn: Callable[[FFNSite], Stage | None] | None = None,
        rows: Share = ALONE,
        gates: Mapping[str, Gates] | None = None,
    ) -> None:
        self._attention, self._gates = attention, dict(gates or {})
        self._states = NO_STATES if config.attention is None else config.attention.states
        self._use_residual = config.attention is not None and config.attention.input == "residual"
        super().__init__(RowChooser(config.holdout, config.seed, rows))
        self._failure = Failure(raised_later=rows.count > 1)
        self._ffn = None if begin_ffn is None else FFNObservers(begin_ffn, self._failure)
        self._sites: dict[str, _SiteObserver] = {}
        self._rejected: dict[str, Rejected] = {}

    @property
    def site_names(self) -> list[str]:
        """Names of the attention sites that matched so far, in model order."""
        return list(self._sites)

    @property
    def ffn_names(self) -> list[str]:
        """Names of the FFN sites that matched so far, in model order."""
        return [] if self._ffn is None else list(self._ffn.sites)

    def backend(
        self, graph_module: GraphModule, example_inputs: Sequence[Any]
    ) -> Callable[..., Any]:
        """Insert an observer behind every matched site and run the graph as it is."""
        nodes = graph_module.graph.find_nodes(op="placeholder")
        names = [node.name for node in nodes]
        values = dict(zip(names, example_inputs, strict=True))
        graph_module = private_copy(graph_module)
        Canonicalize()(graph_module)
        with reported_by_dynamo(), without_collectives(graph_module):
            MatchAttention()(graph_module)  # FFN sites are named so as not to collide with these
            if self._ffn is not None:
                self._ffn.insert(graph_module, values, self._rows)
            if self._attention:
                self._observe_attention(graph_module, values)
        graph_module.graph.lint()
        graph_module.recompile()
        return graph_module.forward

    def _observe_attention(self, graph_module: GraphModule, values: Mapping[str, Any]) -> None:
        matches = load_matches(graph_module)
        for rejected in matches.rejected:
            self._rejected.setdefault(rejected.site, rejected)
        for found in matches.found:
            self._insert(graph_module, found, values)

    def _insert(
        self, graph_module: GraphModule, found: AttentionMatch, values: Mapping[str, Any]
    ) -> None:
        site = found.site
        dtype = found.output.meta["example_value"].dtype
        if dtype not in SUPPORTED_DTYPES:
            raise UnsupportedDtypeError(f"{site} computes in {dtype}; load the model in float32")
        source = found.residual if self._use_residual else found.hidden
        path = found.value_path
        possible = NO_STATES if isinstance(path, str) else self._states
        gates = self._gates.get(site)
        if possible.mixed and gates is None:
            possible = NO_STATES
        if site not in self._sites:
            read = [values[w.name] for w in found.weights if w.name in values]
            weights = tuple(sketch(w) for w in read if isinstance(w, nn.Parameter))
            details = self._details(graph_module, found, source)
            own = None if self._use_residual else own_weights(graph_module, found, values)
            spread = next((w for w in read if is_spread(w)), None)
            if spread is not None:
                if self._states:
                    refuse_spread(found, values)
                own = joined(own, spread)
            self._sites[site] = _SiteObserver(details, weights, possible, own, gates)
        observer = self._sites[site]
        if possible != observer.states:
            raise CalibrationError(
                f"{site}: some batches show what value states are made of and others do not "
                f"({path}); give batches of one kind, or calibrate without taps and mixed values"
            )

        def observe(x: Tensor, y: Tensor, stream: Tensor, mask: Tensor | None) -> None:
            with self._failure, _naming(site):
                split = self._rows.split(site, x)
                if mask is not None:
                    observer.check_mask(mask, split)
                observer.add(x, y, stream, split)

        same = shape_of(found.residual) == shape_of(found.output)
        stream = found.residual if same else found.output
        mask = None if isinstance(path, str) or not possible else path.mask
        x = emit_input(graph_module, found, source, possible, {}, gates)
        with graph_module.graph.inserting_after(found.output):
            graph_module.graph.call_function(observe, (x, found.output, stream, mask))

    def _details(
        self, graph_module: GraphModule, found: AttentionMatch, source: Node
    ) -> dict[str, Any]:
        details: dict[str, Any] = {
            "parameters": _parameters(found.weights),
            "input": "residual" if self._use_residual else "normed",
            "width_in": int((shape_of(source) or (0,))[-1]),
        }
        if not self._states:
            return details
        if isinstance(found.value_path, str):
            return {**details, "no_states": found.value_path}
        read = value_weights(found.value_path, found.hidden, Topology(graph_module))
        return {**details, "value_parameters": _parameters(read)}

    def finish(self) -> Observation:
        """Return everything seen, with buffers flushed.

        Raises:
            CalibrationError: naming the site whose last rows hold NaN or infinity.
        """
        self._failure.check()
        sites = {}
        for name, site in self._sites.items():
            with _naming(name):
                sites[name] = site.finish()
        return Observation(sites, dict(self._rejected), self._ffn)

    def release(self) -> None:
        """Let go of all moments: whatever else holds this observer must not hold them."""
        self._rows.forget()
        self._ffn = None
        for site in self._sites.values():
            site.release()


def _parameters(weights: Iterable[Node]) -> int:
    return sum(prod(int(size) for size in shape_of(weight) or ()) for weight in weights)


@contextmanager
def _naming(site: str) -> Iterator[None]:
    """Say which site a calibration error comes from."""
    try:
        yield
    except CalibrationError as error:
        raise CalibrationError(
            f"{site}: {error}; check the model and its dtype (float16 overflows at 65,504: load "
            "bfloat16 or float32)"
        ) from None
