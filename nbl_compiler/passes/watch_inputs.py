"""Let a monitored graph add up what the plan's sites read.

    before   y = x Wᵀ + b                     (or a folded FFN of x)
    after    add_inputs(first, second, x, mean, rate);  y = x Wᵀ + b

x [..., d]; first and second [d] float64 are lifted tensors, changed in place, for every site. One
counter of tokens serves all sites that read equally many. Guards then count into tensors of this
graph's own. The pass runs for graphs that are compiled inside ``nbl_compiler.monitor`` alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from nbl_compiler.guard_counters import accumulate
from nbl_compiler.monitoring.statistics import add_inputs, count_tokens
from nbl_compiler.monitoring.watch import GraphWatch
from nbl_compiler.passes.base import PassReport
from nbl_compiler.passes.emit import Emitter
from nbl_compiler.passes.ffn_sites import load_folded
from nbl_compiler.passes.ffn_weights import parameter_value
from nbl_compiler.passes.graph_tools import example_value, is_call, shape_of
from nbl_compiler.passes.lifting import lift
from nbl_compiler.passes.sites import load_linearized
from nbl_compiler.plans import Plan, Site

_REWRITES = ("linearize_attention", "fold_ffn")


@dataclass(frozen=True)
class WatchInputs:
    """Add the sums in front of every rewritten site, if somebody monitors these weights."""

    watch: GraphWatch
    name: str = "watch_inputs"

    def __call__(self, graph_module: GraphModule) -> PassReport:
        if not self.watch.begin(site_weights(graph_module)):
            return PassReport(notes=("not monitored",))
        counters: dict[tuple[object, ...], tuple[Node, Tensor]] = {}
        for name, first in _first_nodes(graph_module).items():
            _watch(graph_module, self.watch, self.watch.plan.site(name), first, counters)
        for node in list(graph_module.graph.nodes):
            if is_call(node, {accumulate}):
                _count_apart(graph_module, self.watch, node)
        return PassReport(notes=(f"{len(self.watch.inputs)} sites watched",))


def site_weights(graph_module: GraphModule) -> Iterator[nn.Parameter]:
    """Yield the parameters that the rewritten sites read before they were rewritten."""
    read = [match.weights for match in load_linearized(graph_module)]
    read += [match.weights for match in load_folded(graph_module)]
    for node in chain.from_iterable(read):
        value = parameter_value(node)
        if value is not None:
            yield value


def _first_nodes(graph_module: GraphModule) -> dict[str, Node]:
    """Return site → the first node that a rewrite put into the graph; it reads the site's x."""
    first: dict[str, Node] = {}
    for node in graph_module.graph.nodes:
        origin = node.meta.get("nbl")
        if origin is not None and origin["pass"] in _REWRITES:
            first.setdefault(origin["site"], node)
    return first


def _watch(
    graph_module: GraphModule,
    watch: GraphWatch,
    site: Site,
    first: Node,
    counters: dict[tuple[object, ...], tuple[Node, Tensor]],
) -> None:
    x = first.args[0]
    assert isinstance(x, Node)
    like = example_value(x)
    assert isinstance(like, Tensor)
    with graph_module.graph.inserting_before(first):
        emitter = Emitter(graph_module.graph, {"nbl": {"site": site.name, "pass": "watch_inputs"}})
        key = (*(shape_of(x) or ())[:-1], like.device)
        if key not in counters:
            tokens = watch.new_tokens(like.device)
            counters[key] = (lift(graph_module, f"{site.name}_tokens", tokens), tokens)
            emitter.call(count_tokens, counters[key][0], x)
        known = _statistics(watch.plan, site, like.device)
        width = 0 if known is None else known[0].numel()
        sums = watch.new_sums(site.name, width, counters[key][1])
        if known is None:
            return
        parts = zip(
            ("first", "second", "mean", "rate"), (sums.first, sums.second, *known), strict=True
        )
        own = [lift(graph_module, f"{site.name}_{name}", tensor) for name, tensor in parts]
        emitter.call(add_inputs, own[0], own[1], x, own[2], own[3])


def _statistics(plan: Plan, site: Site, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Return (mean, 1 / scale) of a site's inputs on a device, if the plan knows them."""
    if not site.inputs:
        return None
    mean = plan.remember(
        (site.name, "input_mean", device), lambda: site.inputs["input_mean"].to(device)
    )
    rate = plan.remember(
        (site.name, "input_rate", device),
        lambda: site.inputs["input_scale"].to(device).reciprocal(),
    )
    return mean, rate


def _count_apart(graph_module: GraphModule, watch: GraphWatch, node: Node) -> None:
    """Give a guard counters of this graph's own: those of the plan belong to all its models."""
    site = watch.plan.site(node.meta["nbl"]["site"])
    shared = node.args[0]
    assert isinstance(shared, Node)
    value = example_value(shared)
    assert isinstance(value, Tensor)
    counters = watch.new_guards(site, value.device)
    node.args = (lift(graph_module, f"{site.name}_own_counters", counters), *node.args[1:])
