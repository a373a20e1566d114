"""What attention's own weights make of values, read off the graph by running it on unit vectors.

    v = V x + …            [n, d], n = key/value heads · head size
    y = Σ_h O_h z_h + …    O_h [d_out, head size], z_h what head h mixed of its values

Both are found whichever way a model spells its projections (fused, transposed, with adapters): the
nodes between the two ends are run as they are. A site where they are not affine (a gate between the
mixed values and the output projection, a norm of the values) has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from nbl_compiler.passes.graph_tools import Topology, example_value, traced_size
from nbl_compiler.passes.sites import AttentionMatch
from nbl_compiler.tensor_parallel import whole_of_parts

# What is read off must explain a random input to this relative error.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class OwnWeights:
    """The two linear maps of one attention site.

    Args:
        value: V, [key/value heads, head size, d], float64.
        output: O, [d_out, heads, head size], float64.
    """

    value: Tensor
    output: Tensor


def own_weights(
    graph_module: GraphModule, match: AttentionMatch, values: Mapping[str, Any]
) -> OwnWeights | None:
    """Return a site's own maps, or None where they are not affine or cannot be told.

    Args:
        graph_module: The graph.
        match: The site.
        values: Name of a graph input → its value.
    """
    if isinstance(match.value_path, str):
        return None
    new, mixed = _example(match.value_path.new), _example(match.mixed)
    hidden = _example(match.hidden)
    if (hidden.ndim, new.ndim, mixed.ndim) != (3, 4, 4) or mixed.shape[1] % new.shape[1]:
        return None
    probe = _Probe(graph_module, values, hidden)
    heads, size = int(mixed.shape[1]), int(mixed.shape[3])
    kv_heads, width = int(new.shape[1]), int(hidden.shape[2])

    def as_hidden(rows: Tensor) -> Tensor:
        return rows

    def as_mixed(rows: Tensor) -> Tensor:
        return rows.view(*rows.shape[:-1], heads, size).transpose(1, 2)

    value = probe.matrix(match.hidden, match.value_path.new, width, as_hidden, _of_heads)
    if value is None:
        return None
    output = probe.matrix(match.mixed, match.output, heads * size, as_mixed, lambda made: made)
    if output is None:
        return None
    return OwnWeights(
        value.unflatten(0, (kv_heads, -1)), output.unflatten(1, (heads, size)).contiguous()
    )


def joined(own: OwnWeights | None, weight: Any) -> OwnWeights | None:
    """Return the maps of all heads, from those of this process's heads of a tensor-parallel site.

    Args:
        own: Of this process's heads, in float64, or None where they cannot be told.
        weight: A weight of the site; its processes must all ask, and get None if one of them does.
    """
    group = weight.device_mesh.get_group()
    told: list[bool] = [False] * dist.get_world_size(group)
    dist.all_gather_object(told, own is not None, group=group)
    if own is None or not all(told):
        return None
    value, output = (part.to(weight.device) for part in (own.value, own.output))
    return OwnWeights(
        whole_of_parts(value, 0, weight).to(own.value.device),
        whole_of_parts(output, 1, weight).contiguous().to(own.output.device),
    )


def _of_heads(made: Tensor) -> Tensor:
    return made.transpose(1, 2).flatten(2)


def _example(node: Node) -> Tensor:
    value = example_value(node)
    assert isinstance(value, Tensor)
    return value


class _Probe:
    """Runs the nodes between two ends of a graph."""

    def __init__(self, graph_module: GraphModule, values: Mapping[str, Any], like: Tensor) -> None:
        self._graph_module, self._values = graph_module, values
        self._topology = Topology(graph_module)
        self._batch, self._length = (traced_size(size) for size in like.shape[:2])
        self._dtype, self._device = like.dtype, like.device

    def matrix(
        self,
        source: Node,
        target: Node,
        width: int,
        enter: Callable[[Tensor], Tensor],
        leave: Callable[[Tensor], Tensor],
    ) -> Tensor | None:
        """Return the linear part [out, width] of what lies between two nodes, if it is affine."""
        run = self._runner(source, target)
        if run is None:
            return None
        generator = torch.Generator().manual_seed(0)
        check = torch.randn(1, width, generator=generator)
        rows = torch.cat([torch.zeros(1, width), check, torch.eye(width)])
        per_call = self._batch * self._length
        made = []
        for part in rows.split(per_call):
            full = torch.zeros(per_call, width)
            full[: len(part)] = part
            entering = full.view(self._batch, self._length, width).to(run.device, self._dtype)
            out = leave(run(enter(entering))).flatten(0, 1)
            made.append(out[: len(part)].double().cpu())
        found = torch.cat(made)
        linear = found[2:] - found[0]
        error = (found[1] - found[0] - check.double()[0] @ linear).norm()
        return linear.T if bool(error <= TOLERANCE * found[1].norm()) else None

    def _runner(self, source: Node, target: Node) -> _Run | None:
        cone = self._topology.backward(target, lambda node: node is source)
        known: dict[Node, Any] = {}
        for node in cone:
            if node.op != "placeholder" or node is source:
                continue
            value = self._values.get(node.name)
            if isinstance(value, int | torch.SymInt):
                known[node] = traced_size(value)
            elif isinstance(value, nn.Parameter):
                known[node] = value.detach()
            else:
                return None  # it depends on the text
        if not any(isinstance(value, Tensor) for value in known.values()):
            return None
        nodes = [node for node in cone if node is not source and node not in known]
        return _Run(self._graph_module, source, target, nodes, known, self._device)


@dataclass(frozen=True)
class _Run:
    graph_module: GraphModule
    source: Node
    target: Node
    nodes: list[Node]
    known: dict[Node, Any]
    device: torch.device

    def __call__(self, value: Tensor) -> Tensor:
        runner = Interpreter(self.graph_module, garbage_collect_values=False)
        runner.env = {**self.known, self.source: value}
        with torch.no_grad():
            for node in self.nodes:
                runner.env[node] = runner.run_node(node)
        made: Tensor = runner.env[self.target]
        return made
