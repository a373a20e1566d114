"""Everything that is known about the sites of one graph, a row each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from nbl_compiler.cost import Cost, Machine, graph_cost
from nbl_compiler.passes.base import source_line
from nbl_compiler.passes.ffn_sites import FFNMatch, load_ffn_matches
from nbl_compiler.passes.graph_tools import example_value, shape_of
from nbl_compiler.passes.pipeline import PassRun
from nbl_compiler.passes.site_lookup import find_site
from nbl_compiler.passes.sites import AttentionMatch, load_matches
from nbl_compiler.plans import Kind, Plan

State = Literal["rewritten", "left dense", "rejected"]
_MATCHERS = ("match_attention", "match_ffn")


@dataclass(frozen=True)
class NodeView:
    """One node of a graph as people read it.

    Args:
        name: Its name.
        operation: What it calls.
        inputs: Names of the nodes it reads.
        shape: Of its value, as text, or empty.
    """

    name: str
    operation: str
    inputs: tuple[str, ...]
    shape: str

    def __str__(self) -> str:
        return f"{self.name} = {self.operation}({', '.join(self.inputs)})  # {self.shape}"


@dataclass(frozen=True)
class Side(Cost):
    """A site before or after the passes: the work of its nodes, and the nodes."""

    nodes: tuple[NodeView, ...] = ()


@dataclass(frozen=True)
class SiteRow:
    """One site of one graph.

    Args:
        graph: Number of the graph, in the order of tracing.
        site: Name of the site (the plan's, if the plan knows it).
        kind: ``"attention"`` or ``"ffn"``.
        state: ``"rewritten"``, ``"left dense"`` (it matches) or ``"rejected"``.
        matched: What matched, in words.
        reason: Why it is left alone; empty if rewritten.
        node: The node that names the site, or that decided against it.
        source: The line of the model's code that made this node.
        nmse: Training NMSE of the plan's map (nan without).
        holdout_nmse: The same on held-out tokens.
        cca_bound: Σ (1 − ρ²), NBL's theorem 3.2 (nan without).
        before: The site as traced (nothing for a rejected one).
        after: The site as it is lowered; the same as ``before`` if it is left dense.
        measured: Seconds before and after, if they were measured.
    """

    graph: int
    site: str
    kind: Kind
    state: State
    matched: str
    reason: str
    node: str
    source: str
    nmse: float = float("nan")
    holdout_nmse: float = float("nan")
    cca_bound: float = float("nan")
    before: Side = field(default_factory=Side)
    after: Side = field(default_factory=Side)
    measured: tuple[float, float] | None = None

    def predicted(self, machine: Machine | None) -> tuple[float, float] | None:
        """Return roofline seconds before and after; None without rates or a region."""
        if machine is None or not self.before.nodes:
            return None
        return self.before.seconds(machine), self.after.seconds(machine)


class Snapshots:
    """Takes the matched regions down while the passes run: they are gone afterwards.

    Args:
        graph_module: The graph before the first pass.
    """

    def __init__(self, graph_module: GraphModule) -> None:
        self._work = {work.node: work for work in graph_cost(graph_module).work}
        self.position = {node.name: i for i, node in enumerate(graph_module.graph.nodes)}
        self.regions: list[tuple[Kind, AttentionMatch | FFNMatch, Side, str]] = []

    def before(self, index: int, name: str, graph_module: GraphModule) -> None:
        """Nothing to take down before a pass."""

    def after(self, index: int, run: PassRun, graph_module: GraphModule) -> None:
        """Take down what a matcher found."""
        if run.name == "match_attention":
            self._take("attention", load_matches(graph_module).found)
        elif run.name == "match_ffn":
            self._take("ffn", load_ffn_matches(graph_module).found)

    def _take(self, kind: Kind, found: Iterable[AttentionMatch | FFNMatch]) -> None:
        for match in found:
            nodes = (*match.interior, match.output)
            work = tuple(self._work[n.name] for n in nodes if n.name in self._work)
            side = Side(work, tuple(map(view, nodes)))
            self.regions.append((kind, match, side, source_line(match.anchor)))


def site_rows(
    number: int,
    snapshots: Snapshots,
    runs: Iterable[PassRun],
    graph_module: GraphModule,
    plan: Plan,
) -> list[SiteRow]:
    """Return the rows of one graph, in graph order.

    Args:
        number: Of the graph.
        snapshots: What the matchers found.
        runs: The passes.
        graph_module: The graph after the passes.
        plan: The plan that was applied.
    """
    left = {(r.kind, r.site): r for run in runs for r in run.report.rejected}
    rewritten = _rewritten_sides(graph_module)
    rows: list[tuple[int, SiteRow]] = []
    for kind, match, before, source in snapshots.regions:
        known = find_site(plan, match, kind)
        name = match.site if known is None else known.name
        done = rewritten.get(name) if known and known.decision == "rewritten" else None
        why = left.get((kind, name))
        reason = "" if done else why.reason if why and plan.sites else "no plan"
        row = SiteRow(
            number, name, kind, "rewritten" if done else "left dense", _matched(match), reason,
            match.anchor.name, source, before=before, after=done or before,
        )  # fmt: skip
        if known is not None:
            row = replace(
                row, nmse=known.nmse, holdout_nmse=known.holdout_nmse, cca_bound=known.cca_bound
            )
        rows.append((snapshots.position.get(match.anchor.name, 0), row))
    for run in runs:
        for item in run.report.rejected if run.name in _MATCHERS else ():
            place = snapshots.position.get(item.node, 0)
            row = SiteRow(
                number, item.site, item.kind, "rejected", "-", item.reason, item.node, item.source
            )
            rows.append((place, row))
    return [row for _, row in sorted(rows, key=lambda pair: pair[0])]


def view(node: Node) -> NodeView:
    """Return a node as people read it."""
    value = example_value(node)
    shape = shape_of(node)
    kind = str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else ""
    text = "" if shape is None else f"{kind}[{', '.join(map(str, shape))}]"
    return NodeView(node.name, _operation(node), tuple(n.name for n in node.all_input_nodes), text)


def _operation(node: Node) -> str:
    if node.op == "call_method":
        return f".{node.target}"
    name = getattr(node.target, "__name__", None)
    if isinstance(node.target, torch._ops.OpOverload):
        name = str(node.target)
    return str(name or node.target)


def _rewritten_sides(graph_module: GraphModule) -> dict[str, Side]:
    """Return site → what the passes put in its place."""
    work = {w.node: w for w in graph_cost(graph_module).work}
    nodes: dict[str, list[Node]] = {}
    for node in graph_module.graph.nodes:
        origin: Mapping[str, Any] = node.meta.get("nbl", {})
        if "site" in origin:
            nodes.setdefault(origin["site"], []).append(node)
    return {
        site: Side(tuple(work[n.name] for n in group if n.name in work), tuple(map(view, group)))
        for site, group in nodes.items()
    }


def _matched(match: AttentionMatch | FFNMatch) -> str:
    """Say in a few words what the region is."""
    if isinstance(match, AttentionMatch):
        cache = " with KV cache" if match.cache_writes or match.cache_appends else ""
        return f"{_operation(match.anchor)}{cache}, {len(match.weights)} weights"
    gated = "gated " if match.gate is not None else ""
    return f"{gated}{match.activation}, {len(match.weights)} weights"
