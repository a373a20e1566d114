"""A traced graph with switches that is run over and over: only what a run needs is computed.

Before the first site that is replaced, everything is as in the dense model. So the dense run keeps
the values that are still needed behind some cuts, and later runs begin at the last cut before
their first replaced site. Of a replaced site they do not compute the inside, of the others not what
only a stand-in would read.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

from torch.fx import GraphModule, Interpreter, Node

from nbl_compiler.passes.graph_tools import has_effect, is_write

MOST_CUTS = 8
"""Each holds the residual stream of all tokens of the trials, and little else."""

Values = dict[Node, Any]


class TrialGraph:
    """Runs a graph from the latest cut that is allowed.

    A graph that writes to tensors in place is run whole: it would change what is kept, and what a
    write is for cannot be told from who reads its result.

    Args:
        graph_module: The graph; it does not change any more.
        switches: Site name → its switch (``passes.switches``).
    """

    def __init__(self, graph_module: GraphModule, switches: Mapping[str, Node]) -> None:
        self._graph_module = graph_module
        nodes = list(graph_module.graph.nodes)
        self._position = {node: i for i, node in enumerate(nodes)}
        self._switches = dict(switches)
        self._cuts = _cuts(nodes, switches.values(), self._position)
        self._whole = any(is_write(node) for node in nodes)
        self._roots = [node for node in nodes if node.op == "output" or has_effect(node)]
        self._kept: dict[Hashable, dict[Node, Values]] = {}

    def __call__(self, args: Sequence[Any], text: Hashable, active: Collection[str]) -> Any:
        """Return what the graph gives.

        Args:
            args: Its inputs; always the same for the same text while no site of another graph is
                active.
            text: What they are made of.
            active: Names of the sites that are replaced now, in this or other graphs.
        """
        if not active:
            return self._dense(args, text)
        if self._whole:
            return Interpreter(self._graph_module).run(*args)
        start = self._start(text, active)
        begin, kept = (0, {}) if start is None else (self._position[start], self._kept[text][start])
        needed = self._needed(active)
        left_out: Values = {
            node: None
            for node, position in self._position.items()
            if node.op != "placeholder" and (position < begin or node not in needed)
        }
        return Interpreter(self._graph_module).run(*args, initial_env={**left_out, **kept})

    def release(self) -> None:
        """Let go of all that is kept."""
        self._kept = {}

    def _dense(self, args: Sequence[Any], text: Hashable) -> Any:
        keeper = _Keeper(self._graph_module, {} if self._whole else self._cuts)
        result = keeper.run(*args)
        again = text in self._kept  # called more than once for a text: which call is which?
        self._kept[text] = {} if again else keeper.kept
        return result

    def _needed(self, active: Collection[str]) -> set[Node]:
        """Return the nodes whose values a run asks for."""
        read = {node: node.args[site not in active] for site, node in self._switches.items()}
        needed: set[Node] = set()
        left = list(self._roots)
        while left:
            node = left.pop()
            if node in needed:
                continue
            needed.add(node)
            chosen = read.get(node)
            left += [chosen] if isinstance(chosen, Node) else node.all_input_nodes
        return needed

    def _start(self, text: Hashable, active: Collection[str]) -> Node | None:
        """Return the cut to begin at, or None to run everything."""
        kept = self._kept.get(text, {})
        if not all(site in self._switches for site in active):
            return None
        first = min(self._position[self._switches[site]] for site in active)
        allowed = [cut for cut in kept if self._position[cut] <= first]
        return max(allowed, key=lambda cut: self._position[cut], default=None)


class _Keeper(Interpreter):
    """Runs everything, and keeps what is alive at each cut.

    Args:
        graph_module: The graph.
        cuts: Switch → nodes whose values are needed from there on.
    """

    def __init__(self, graph_module: GraphModule, cuts: Mapping[Node, Sequence[Node]]) -> None:
        super().__init__(graph_module)
        self._cuts = cuts
        self.kept: dict[Node, Values] = {}

    def run_node(self, n: Node) -> Any:
        """Run one node."""
        if n in self._cuts:
            self.kept[n] = {node: self.env[node] for node in self._cuts[n]}
        return super().run_node(n)


def _cuts(
    nodes: Sequence[Node], switches: Collection[Node], position: Mapping[Node, int]
) -> dict[Node, list[Node]]:
    """Return some switches, each with the nodes before it that it or later nodes read."""
    order = sorted(switches, key=lambda node: position[node])
    chosen = order[:: -(-len(order) // MOST_CUTS)] if order else []
    made: dict[Node, list[Node]] = {cut: [] for cut in chosen}
    for node in nodes:
        last = max((position[user] for user in node.users), default=-1)
        if node.op == "placeholder":  # given anew in every run
            continue
        for cut in chosen:
            if position[node] < position[cut] <= last:
                made[cut].append(node)
    return made
