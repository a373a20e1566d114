"""Running a model with any of its sites replaced, and comparing what it says with the dense model.

What is compared: ``disturbance.py``.

One traced graph serves all trials: at every site a switch passes the dense output on, or that of
the site's stand-in. What lies before the first replaced site is computed once (``trial_graph.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from nbl_compiler.disturbance import Distributions, Outputs, Said
from nbl_compiler.errors import ConfigError
from nbl_compiler.passes.canonicalize import Canonicalize
from nbl_compiler.passes.collectives import without_collectives
from nbl_compiler.passes.emit_states import emit_input
from nbl_compiler.passes.match_attention import match
from nbl_compiler.passes.match_ffn import match_ffn
from nbl_compiler.passes.private_copy import private_copy
from nbl_compiler.passes.switches import StandIn, insert_switch
from nbl_compiler.several_processes import ALONE, Share, all_sum
from nbl_compiler.trial_graph import TrialGraph
from nbl_compiler.trial_text import MOST_KINDS, Part
from nbl_compiler.value_states import NO_STATES, Gates, States


class Trial:
    """The dense model, whose sites can be replaced by stand-ins.

    Args:
        model: The dense model.
        sites: Names of the sites that may be replaced.
        kinds: Kinds of text, each as parts of batches; the worst kind counts.
        residual: Whether attention's stand-ins read the residual stream.
        states: Site name → the value states that its stand-ins get besides.
        gates: Site name → the gates of mixed values.
        share: Which parts this process runs, if all processes of a ``torch.distributed`` job have
            the same text. In a job every process makes the same calls, and all get the
            disturbance over the text of all.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Iterable[str],
        kinds: Sequence[Sequence[Part]],
        *,
        residual: bool,
        states: Mapping[str, States] | None = None,
        gates: Mapping[str, Gates | None] | None = None,
        share: Share = ALONE,
    ) -> None:
        self._sites, self._residual = frozenset(sites), residual
        self._states, self._gates = dict(states or {}), dict(gates or {})
        self._active: Mapping[str, StandIn] = {}
        self._kinds = _own_parts(kinds, share)
        # A function of its own: Dynamo must not keep these graphs with the model's forward.
        self._forward = torch.compile(lambda **inputs: model(**inputs), backend=self._backend)
        self._dense: dict[int, Said] = {}
        self._graphs: list[TrialGraph] = []
        self._part = 0
        self._predicts = True
        self._order = list(range(MOST_KINDS))

    @property
    def predicts_tokens(self) -> bool:
        """Whether disturbances are divergences in nats, rather than relative squared errors."""
        return self._predicts

    def __call__(self, active: Mapping[str, StandIn], *, kinds: int = MOST_KINDS) -> float:
        """Return the disturbance of some sites' stand-ins together, on the worst kind of text.

        Args:
            active: Site name → what stands in for it; all others are dense.
            kinds: How many kinds of text to try, from the first on; by default all.

        Raises:
            ConfigError: if the model returns no tensor.
        """
        return max(self.each_kind(active, kinds=kinds).values())

    def each_kind(
        self,
        active: Mapping[str, StandIn],
        *,
        kinds: int = MOST_KINDS,
        before: Mapping[int, float] | None = None,
        limit: float = math.inf,
    ) -> dict[int, float]:
        """Return kind of text → the disturbance of some sites' stand-ins together.

        Args:
            active: As for a call, as is ``kinds``.
            kinds: See there.
            before: What to compare with ``limit``: how much each kind has risen from there.
            limit: Once a kind has risen by more the others are left out. Those that rose most in
                the last whole trial come first.

        Raises:
            ConfigError: if the model returns no tensor.
        """
        if not self._dense:
            self._active = {}
            every = (part for kind in self._kinds for part in kind)
            self._dense = {id(part): self._dense_said(part) for part in every}
        if not active:
            return dict.fromkeys(range(kinds), 0.0)
        self._active, before = active, before or {}
        found: dict[int, float] = {}
        rises: dict[int, float] = {}
        for kind in self._order:
            if kind < kinds and max(rises.values(), default=-math.inf) <= limit:
                found[kind] = self._disturbance(kind)
                rises[kind] = found[kind] - before.get(kind, 0.0)
        if len(rises) == MOST_KINDS:
            self._order.sort(key=rises.__getitem__, reverse=True)
        return found

    def _disturbance(self, kind: int) -> float:
        """Return that of one kind of text, over all processes; 0 where there is no such text."""
        parts = self._kinds[kind] if kind < len(self._kinds) else ()
        sums = torch.tensor(self._error_and_total(parts), dtype=torch.float64)
        all_sum(sums)
        error, total = sums.tolist()
        return error / total if total else 0.0

    def _error_and_total(self, parts: Sequence[Part]) -> tuple[float, float]:
        error, total = 0.0, 0.0
        for part in parts:
            more, own = self._dense[id(part)].compared_with(self._said(part))
            error, total = error + more, total + own
        return error, total

    def release(self) -> None:
        """Let go of stand-ins and predictions: Dynamo's cache may outlive this object's use."""
        self._active, self._dense = {}, {}
        for graph in self._graphs:
            graph.release()

    def _dense_said(self, part: Part) -> Said:
        said = self._said(part)
        return Distributions(said) if self._predicts else Outputs(said)

    def _said(self, part: Part) -> Tensor:
        """Return logits [n, V], or the rows of the main output [n, d]."""
        self._part = id(part)
        returned = self._forward(**part.inputs)
        logits = getattr(returned, "logits", None)
        self._predicts = isinstance(logits, Tensor)
        main = logits if isinstance(logits, Tensor) else _main_output(returned)
        flat = main.flatten(0, -2)
        # One output a row (a classifier's) has no positions to choose from.
        if main.ndim >= 3 and part.keep is not None:
            flat = flat[part.keep(flat.shape[0])]
        return flat.float()

    def _backend(self, graph_module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        del inputs
        graph_module = private_copy(graph_module)
        Canonicalize()(graph_module)
        with without_collectives(graph_module):
            switches = self._insert_switches(graph_module)
        graph_module.graph.lint()
        graph_module.recompile()
        graph = TrialGraph(graph_module, switches)
        self._graphs.append(graph)
        return lambda *args: graph(args, self._part, self._active)

    def _insert_switches(self, graph_module: GraphModule) -> dict[str, Node]:
        """Return site name → its switch."""
        switches: dict[str, Node] = {}

        def insert(site: str, read: Node, output: Node) -> None:
            if site in self._sites:
                switches[site] = insert_switch(
                    graph_module, read, output, lambda: self._active.get(site)
                )

        # Both are matched before a switch hides one site from the other's matcher.
        attention, ffn = match(graph_module).found, match_ffn(graph_module).found
        for one in attention:
            source = one.residual if self._residual else one.hidden
            states, gates = self._states.get(one.site, NO_STATES), self._gates.get(one.site)
            read = emit_input(graph_module, one, source, states, {}, gates)
            insert(one.site, read, one.output)
        for other in ffn:
            insert(other.site, other.hidden, other.output)
        return switches


def _own_parts(kinds: Sequence[Sequence[Part]], share: Share) -> list[list[Part]]:
    """Return the parts that this process runs, of each kind of text."""
    parts = [(kind, part) for kind, parts in enumerate(kinds) for part in parts]
    own = parts[share.index :: share.count]
    return [[part for of, part in own if of == kind] for kind in range(len(kinds))]


def _main_output(returned: object) -> Tensor:
    values = returned.values() if isinstance(returned, Mapping) else returned
    if isinstance(values, Tensor):
        return values
    for value in values if hasattr(values, "__iter__") else ():
        if isinstance(value, Tensor):
            return value
    raise ConfigError(
        'rank_by="loss" compares what the model returns, and this one returned no tensor; use '
        'rank_by="nmse"'
    )
