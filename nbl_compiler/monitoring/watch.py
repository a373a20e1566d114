"""Which compiled graphs are being monitored, and what they add up meanwhile.

A graph that holds a plan's maps is compiled in up to two variants: without any counting, and, the
first time it runs inside ``nbl_compiler.monitor``, with it. A Dynamo guard picks the one that is
wanted, so that a model that is not monitored runs exactly the code it would run without this
module, and entering the context again compiles nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import Any
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from nbl_compiler.identity_guard import code_being_compiled
from nbl_compiler.monitoring.statistics import InputSums
from nbl_compiler.plans import Plan, Site

_serial = count()


class GraphWatch:
    """One compiled graph of a plan, and its sums if it is the variant that counts.

    ``on`` says whether somebody monitors the graph now; ``counting`` is what it was compiled for.

    Args:
        plan: The plan whose maps the graph holds.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.weights = WeakIdKeyDictionary()
        self.on = False
        self.counting = False
        self.inputs: dict[str, InputSums] = {}
        self.guards: dict[str, Tensor] = {}
        self._serial = next(_serial)

    @property
    def wanted(self) -> bool:
        """Whether somebody may want this graph to count: its weights are not known yet."""
        return any(subject.plan in (None, self.plan) for subject in _subjects)

    def begin(self, weights: Iterable[nn.Parameter]) -> bool:
        """Take note of the graph's sites by their weights; return whether it is to count."""
        for weight in weights:
            self.weights[weight] = True
        _graphs.add(self)
        self.on = False
        for subject in _subjects:
            if subject.covers(self):
                self.on = True
                subject.graphs.append(self)
        self.counting = self.on
        return self.counting

    def new_sums(self, site: str, width: int, tokens: Tensor) -> InputSums:
        """Return sums at zero for a site.

        Args:
            site: Its name in the plan.
            width: d, of what it reads; 0 if its distribution is not known.
            tokens: From ``new_tokens``.
        """
        with torch.inference_mode(False):  # they outlive the caller's mode
            first, second = (
                torch.zeros(width, dtype=torch.float64, device=tokens.device) for _ in range(2)
            )
        self.inputs[site] = InputSums(first, second, tokens)
        return self.inputs[site]

    def new_tokens(self, device: torch.device) -> Tensor:
        """Return a counter of tokens at zero, [] int64."""
        with torch.inference_mode(False):
            return torch.zeros((), dtype=torch.int64, device=device)

    def new_guards(self, site: Site, device: torch.device) -> Tensor:
        """Return guard counters of this graph's own, which ``nbl.guard_counts`` adds in as well."""
        counters = self.plan.counters(site.name, device, of=self._serial)
        self.guards[site.name] = counters
        return counters

    def zero(self) -> None:
        """Set the sums to zero: rounding and NaN of the past must not reach the next window."""
        for sums in self.inputs.values():
            for tensor in (sums.first, sums.second, sums.tokens):
                tensor.zero_()


@dataclass(eq=False)
class Subject:
    """What is monitored.

    Args:
        plan: Only graphs of this plan; None for any.
        weights: Only graphs whose sites read some of these parameters; None for any.
        graphs: Those found so far: the counting variants alone hold sums.
    """

    plan: Plan | None
    weights: WeakIdKeyDictionary | None
    graphs: list[GraphWatch] = field(default_factory=list)

    def covers(self, graph: GraphWatch) -> bool:
        """Tell whether a graph belongs to what is monitored."""
        if self.plan is not None and graph.plan is not self.plan:
            return False
        return self.weights is None or any(w in self.weights for w in graph.weights)


_graphs: WeakSet[GraphWatch] = WeakSet()
_subjects: list[Subject] = []


def known_graphs(subject: Subject) -> list[GraphWatch]:
    """Return the compiled graphs that belong to a subject."""
    return [graph for graph in list(_graphs) if subject.covers(graph)]


def start(subject: Subject) -> None:
    """Let the graphs of a subject count from now on."""
    subject.graphs = known_graphs(subject)
    for graph in subject.graphs:
        if not graph.on:
            graph.zero()
    _subjects.append(subject)
    _switch()


def stop(subject: Subject) -> None:
    """Let them stop, unless another monitor wants them."""
    _subjects.remove(subject)
    _switch()


def _switch() -> None:
    for graph in list(_graphs):
        graph.on = any(subject.covers(graph) for subject in _subjects)


def guard_on_watch(watch: GraphWatch, weights: Iterable[nn.Parameter]) -> None:
    """Make the code that is being compiled run only while it counts if and only if it shall.

    Args:
        watch: Of the graph.
        weights: What the plan's sites in this graph read; a graph without sites needs no guard.
    """
    weights = list(weights)
    if not weights:
        return
    if not watch.weights:
        watch.begin(weights)
    if code_being_compiled() is None:  # called outside Dynamo: nothing chooses between variants
        return
    from torch._dynamo.guards import install_guard
    from torch._dynamo.source import GlobalStateSource

    # Guards can outlive the compiled code, which is what keeps the sums.
    compiled_for, alive = watch.counting, ref(watch)

    def as_wanted(_frame: object) -> bool:
        known = alive()
        return known is not None and known.on is compiled_for

    def NBL_MONITOR(builder: Any, guard: Any) -> None:
        text = f"nbl_compiler.monitor is {'on' if compiled_for else 'off'} for this model"
        builder.guard_manager.root.add_lambda_guard(as_wanted, [text], guard.user_stack)

    install_guard(GlobalStateSource().make_guard(NBL_MONITOR))
