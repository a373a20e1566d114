"""The model's graph for one shape of batches, with a switch at every site that is fitted anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch._dynamo
from torch import nn
from torch.fx import GraphModule, Node

from nbl_compiler.batches import cheap_arguments
from nbl_compiler.errors import CalibrationError
from nbl_compiler.passes.canonicalize import Canonicalize
from nbl_compiler.passes.emit_states import emit_input
from nbl_compiler.passes.ffn_sites import FFNMatch
from nbl_compiler.passes.ffn_weights import ffn_weights, parameter_value
from nbl_compiler.passes.graph_tools import Topology, has_effect
from nbl_compiler.passes.match_attention import MatchAttention
from nbl_compiler.passes.match_ffn import match_ffn
from nbl_compiler.passes.private_copy import private_copy
from nbl_compiler.passes.site_lookup import find_site
from nbl_compiler.passes.sites import AttentionMatch, load_matches
from nbl_compiler.passes.stream import find_entry
from nbl_compiler.passes.switches import insert_switch
from nbl_compiler.plans import Plan
from nbl_compiler.refitting.route import Route, Values
from nbl_compiler.solvers.folding import FFNWeights
from nbl_compiler.text_pass import many_shapes, private_forward
from nbl_compiler.value_states import gates_of, states_of


@dataclass(frozen=True)
class Place:
    """One site in one graph.

    Args:
        site: Its name in the plan.
        read: What its stand-in reads.
        output: Its dense output y.
        branch: y as it enters the residual stream; None if it is not simply added to it.
        others: The other summands that are known before the site is computed.
        cut: Position of its switch: all before it is the same whatever stands in.
        end: Position behind everything that is looked at on the dense route.
        weights: The FFN's own weights; None for attention.
    """

    site: str
    read: Node
    output: Node
    branch: Node | None
    others: tuple[Node, ...]
    cut: int
    end: int
    weights: FFNWeights | None

    @property
    def looked_at(self) -> tuple[Node, ...]:
        """The nodes whose values are looked at on the dense route."""
        branch = () if self.branch is None else (self.branch,)
        return (self.output, *branch, *self.others)


@dataclass(frozen=True)
class Traced:
    """A graph with its places in order, and the two routes through it."""

    places: tuple[Place, ...]
    dense: Route
    compressed: Route


@dataclass(frozen=True)
class Recorded:
    """One batch: its graph, and the values of the graph's inputs."""

    traced: Traced
    inputs: Values


class _Stop(Exception):
    """Ends a call of the model once its graph and inputs are known."""


def record(model: nn.Module, plan: Plan, batches: Iterable[Mapping[str, Any]]) -> list[Recorded]:
    """Trace the model over batches of inputs, without computing anything.

    Raises:
        CalibrationError: if a batch does not show every rewritten site in one graph.
    """
    found: list[Recorded] = []

    def backend(graph_module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        del inputs
        names = [node.name for node in graph_module.graph.find_nodes(op="placeholder")]
        traced = _trace(graph_module, plan)

        def stop(*values: Any) -> Any:
            found.append(Recorded(traced, dict(zip(names, values, strict=True))))
            raise _Stop

        return stop

    compiled = torch.compile(private_forward(model), backend=backend, dynamic=None)
    cheap = cheap_arguments(model)
    with torch.no_grad(), many_shapes():
        for batch in batches:
            try:
                compiled(**{**cheap, **batch})
            except _Stop:
                _check_sites(found[-1].traced, plan)
            else:
                raise CalibrationError("the model was not traced: there is nothing to refit")
    return found


def _check_sites(traced: Traced, plan: Plan) -> None:
    seen = {place.site for place in traced.places}
    missing = [site.name for site in plan.rewritten if site.name not in seen]
    if missing:
        raise CalibrationError(
            f"the model's first graph does not show {missing[0]}; a refit needs the whole model in "
            "one graph (torch.compile(model, fullgraph=True) says what breaks it)"
        )


def _trace(graph_module: GraphModule, plan: Plan) -> Traced:
    graph_module = private_copy(graph_module)
    Canonicalize()(graph_module)
    effects = [n for n in graph_module.graph.nodes if n.op not in _ENDS and has_effect(n)]
    MatchAttention()(graph_module)
    attention = load_matches(graph_module).found
    ffn = match_ffn(graph_module).found  # before a switch hides one site from its matcher
    switches: dict[str, Node] = {}
    matches: dict[str, AttentionMatch | FFNMatch] = {}
    reads: dict[str, Node] = {}
    every: list[AttentionMatch | FFNMatch] = [*attention, *ffn]
    for match in every:
        site = find_site(plan, match, "attention" if isinstance(match, AttentionMatch) else "ffn")
        if site is None or site.decision != "rewritten":
            continue
        read = match.hidden
        if isinstance(match, AttentionMatch):
            source = match.residual if site.details.get("input") == "residual" else match.hidden
            states, gates = states_of(site.details), gates_of(site.tensors)
            read = emit_input(graph_module, match, source, states, {}, gates)
        matches[site.name], reads[site.name] = match, read
        switches[site.name] = insert_switch(graph_module, read, match.output, lambda: None)
    topology = Topology(graph_module)
    places = [
        _place(site, matches[site], reads[site], switch, topology)
        for site, switch in switches.items()
    ]
    places.sort(key=lambda place: place.cut)
    dense: dict[Node, int] = {}
    compressed: dict[Node, int] = {}
    for number, place in enumerate(places):
        # No piece ends before the one in front of it.
        place = places[number] = replace(place, end=max(p.end for p in places[: number + 1]))
        dense |= dict.fromkeys(place.looked_at, place.end)
        compressed |= dict.fromkeys((place.read, *place.others), place.cut)
    return Traced(
        tuple(places),
        Route(graph_module, switches, False, dense, effects),
        Route(graph_module, switches, True, compressed, effects),
    )


def _place(
    site: str,
    match: AttentionMatch | FFNMatch,
    read: Node,
    switch: Node,
    topology: Topology,
) -> Place:
    position = topology.position
    cut = position[switch]
    entry = find_entry(switch, topology)
    branch: Node | None = None
    others: tuple[Node, ...] = ()
    if entry is not None:
        branch = entry.branch if entry.branch is not switch else match.output
        others = tuple(node for node in entry.others if position[node] < cut)
    weights = ffn_weights(match, parameter_value) if isinstance(match, FFNMatch) else None
    place = Place(site, read, match.output, branch, others, cut, 0, weights)
    return replace(place, end=max(position[node] for node in place.looked_at) + 1)


_ENDS = frozenset({"placeholder", "output"})
