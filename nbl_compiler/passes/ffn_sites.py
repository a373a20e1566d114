"""The match objects of FFN sites, and reading one projection of such a site."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from nbl_compiler.passes.base import Rejected
from nbl_compiler.passes.elementwise import passed_through
from nbl_compiler.passes.graph_tools import (
    argument,
    example_value,
    is_addition,
    is_call,
    is_cast,
    is_view,
    is_weight,
    projection_input,
    shape_of,
)

_MATCHES = "nbl_ffn_matches"
_LINEAR = frozenset({F.linear, torch._C._nn.linear})
_SPLITS = frozenset({torch.chunk, torch.split, torch.functional.split, torch.tensor_split})
_SPLIT_METHODS = frozenset({"chunk", "split", "tensor_split", "split_with_sizes"})


@dataclass(frozen=True)
class Projection:
    """One linear layer of an FFN site.

    Args:
        node: The ``linear``, ``addmm`` or ``matmul`` node.
        weight: The parameter, [out, in].
        bias: The parameter, [out], or None.
        transposed: The weight is stored as [in, out] instead (GPT-2's ``Conv1D``).
        rows: (start, stop) of the outputs that are meant, where one layer computes gate and up
            together; None means all of them.
    """

    node: Node
    weight: Node
    bias: Node | None
    transposed: bool
    rows: tuple[int, int] | None

    @property
    def source(self) -> Node:
        """The activation that the projection reads."""
        source = projection_input(self.node)
        assert source is not None
        return source


@dataclass(frozen=True)
class FFNMatch:
    """One FFN site in one graph: ``down(act(up(x)))`` or ``down(act(gate(x)) * up(x))``.

    Args:
        site: Name of the site, the path of the deepest module that contains the region.
        anchor: The activation's last node.
        hidden: The hidden state x [..., d] that the projections read, in front of ``Conv1D``'s
            flattening.
        output: The down projection's result y [..., d], behind its bias and behind the view that
            undoes the flattening. It has as many leading dimensions as ``hidden``.
        interior: Every node between ``hidden`` and ``output`` (both excluded), in graph order.
        activation: One of ``nbl_compiler.solvers.activations.ACTIVATION_NAMES``.
        gate: The projection that the activation acts on, if the FFN is gated.
        up: The other one; of a plain FFN, the one that the activation acts on.
        down: The projection back to the width of ``hidden``.
        weights: The parameters the region reads, in graph order.
    """

    site: str
    anchor: Node
    hidden: Node
    output: Node
    interior: tuple[Node, ...]
    activation: str
    gate: Projection | None
    up: Projection
    down: Projection
    weights: tuple[Node, ...]


@dataclass(frozen=True)
class FFNMatches:
    """Every FFN that was found in one graph, in graph order."""

    found: tuple[FFNMatch, ...] = ()
    rejected: tuple[Rejected, ...] = ()


def store_ffn_matches(graph_module: GraphModule, matches: FFNMatches) -> None:
    """Leave the matches on the graph for the passes that follow."""
    graph_module.meta[_MATCHES] = matches


def load_ffn_matches(graph_module: GraphModule) -> FFNMatches:
    """Return what the FFN matcher left on the graph (nothing, if it did not run)."""
    matches = graph_module.meta.get(_MATCHES, FFNMatches())
    assert isinstance(matches, FFNMatches)
    return matches


_FOLDED = "nbl_folded_ffn"


def store_folded(graph_module: GraphModule, matches: tuple[FFNMatch, ...]) -> None:
    """Leave on the graph which sites were folded."""
    graph_module.meta[_FOLDED] = matches


def load_folded(graph_module: GraphModule) -> tuple[FFNMatch, ...]:
    """Return the sites that were folded in this graph."""
    matches = graph_module.meta.get(_FOLDED, ())
    assert isinstance(matches, tuple)
    return matches


def read_projection(result: Node) -> Projection | None:
    """Return the projection whose outputs ``result`` holds, or some neighbouring ones of them.

    Looks through reshapes, casts, a bias that is added separately (Falcon), and the parts of a
    fused projection: ``chunk``, ``split``, ``narrow`` and slices of the last dimension.
    """
    node, rows = result, None
    while True:
        base = _linear(node) or _with_added_bias(node)
        if base is not None:
            return replace(base, rows=rows)
        source = passed_through(node)
        if source is None:
            part = _part(node)
            if part is None:
                return None
            source, start, stop = part
            rows = (start, stop) if rows is None else (start + rows[0], start + rows[1])
        node = source


def is_projection(node: Node) -> bool:
    """Tell whether the node holds outputs of a projection."""
    return read_projection(node) is not None


def layer_behind(result: Node) -> Node:
    """Return the call behind reshapes, casts, slices and an added bias."""
    node = result
    while is_view(node) or passed_through(node) is not None:
        source = node.args[0] if is_view(node) else passed_through(node)
        if not isinstance(source, Node):
            break
        node = source
    added = _with_added_bias(node)
    return node if added is None else added.node


def linear_source(node: Node) -> Node | None:
    """Return the activation that any linear layer reads, also one whose weight is computed."""
    source = argument(node, 0, "input") if is_call(node, _LINEAR) else projection_input(node)
    return source if isinstance(source, Node) else None


def with_added_bias(projection: Node) -> Node:
    """Return the addition of a bias parameter right behind a projection, or the projection."""
    users = list(projection.users)
    if len(users) == 1 and _with_added_bias(users[0]) is not None:
        return users[0]
    return projection


def _linear(node: Node) -> Projection | None:
    """Read ``linear(x, W, b)``, ``addmm(b, x, W)`` or ``x @ W``."""
    if projection_input(node) is None:
        return None
    bias: object = None
    if is_call(node, _LINEAR):
        weight, out_in = argument(node, 1, "weight"), True
        bias = argument(node, 2, "bias")
    elif is_call(node, {torch.addmm}, {"addmm"}):
        if argument(node, 3, "beta", 1) != 1 or argument(node, 4, "alpha", 1) != 1:
            return None
        weight, out_in = argument(node, 2, "mat2"), False
        bias = argument(node, 0, "input")
    else:
        weight, out_in = argument(node, 1, "other", node.kwargs.get("mat2")), False
    parameter = _parameter(weight)
    offset = None if bias is None else _parameter(bias)
    if parameter is None or (bias is not None and offset is None):
        return None
    source, flipped = parameter
    if len(shape_of(source) or ()) != 2 or (offset and len(shape_of(offset[0]) or ()) != 1):
        return None
    return Projection(node, source, offset and offset[0], out_in == flipped, None)


def _with_added_bias(node: Node) -> Projection | None:
    """Read ``x @ W + b``."""
    if not is_addition(node) or node.kwargs or len(node.args) != 2:
        return None
    for product, bias in (node.args, reversed(node.args)):
        if isinstance(product, Node) and isinstance(bias, Node):
            base, offset = _linear(product), _parameter(bias)
            if base and base.bias is None and offset and shape_of(offset[0]) == _width(product):
                return replace(base, bias=offset[0])
    return None


def _width(node: Node) -> tuple[object, ...] | None:
    shape = shape_of(node)
    return None if shape is None else shape[-1:]


def _parameter(node: object) -> tuple[Node, bool] | None:
    """Return (the parameter behind casts and transposes, whether it is transposed)."""
    flipped = False
    while isinstance(node, Node):
        if is_weight(node):
            return node, flipped
        if _transposes(node):
            flipped = not flipped
        elif not is_cast(node):
            return None
        node = node.args[0]
    return None


def _transposes(node: Node) -> bool:
    """Tell whether the node swaps the two dimensions of a matrix."""
    if is_call(node, {getattr}):
        return argument(node, 1, "name") in {"T", "mT"}
    if is_call(node, {torch.t}, {"t"}):
        return True
    if is_call(node, {torch.transpose}, {"transpose"}):
        dims = {argument(node, 1, "dim0"), argument(node, 2, "dim1")}
        return dims in ({0, 1}, {-1, -2}, {0, -1}, {1, -2})
    return False


def _part(node: Node) -> tuple[Node, int, int] | None:
    """Return (source, start, stop) of a node that takes neighbouring entries of the last dim."""
    source = node.args[0] if node.args else None
    if not isinstance(source, Node):
        return None
    if is_call(node, {torch.narrow}, {"narrow"}):
        start, length = argument(node, 2, "start"), argument(node, 3, "length")
        if isinstance(start, int) and isinstance(length, int) and start >= 0:
            dim = argument(node, 1, "dim")
            return (source, start, start + length) if _is_last(dim, source) else None
    if not is_call(node, {operator.getitem}):
        return None
    index = node.args[1]
    return _chunk(source, index) if isinstance(index, int) else _slice(source, index)


def _chunk(split: Node, index: int) -> tuple[Node, int, int] | None:
    """Read ``chunk(x, 2, dim=-1)[index]`` and its relatives."""
    if not is_call(split, _SPLITS, _SPLIT_METHODS):
        return None
    source, parts = split.args[0], example_value(split)
    if not isinstance(source, Node) or not isinstance(parts, list | tuple):
        return None
    if not _is_last(argument(split, 2, "dim", 0), source):
        return None
    widths = [part.shape[-1] for part in parts]
    if not all(isinstance(width, int) for width in widths):
        return None
    index = range(len(widths))[index]
    return source, sum(widths[:index]), sum(widths[: index + 1])


def _slice(source: Node, index: object) -> tuple[Node, int, int] | None:
    """Read ``x[..., start:stop]``."""
    shape = shape_of(source)
    if not isinstance(index, tuple) or not shape or not isinstance(shape[-1], int):
        return None
    *others, last = index
    whole = all(other is Ellipsis or other == slice(None) for other in others)
    reaches_last = Ellipsis in others or len(index) == len(shape)
    if not whole or not reaches_last or not isinstance(last, slice):
        return None
    if not all(bound is None or isinstance(bound, int) for bound in (last.start, last.stop)):
        return None
    if last.step not in (None, 1):
        return None
    start, stop, _ = last.indices(shape[-1])
    return source, start, stop


def _is_last(dim: object, node: Node) -> bool:
    shape = shape_of(node)
    return shape is not None and isinstance(dim, int) and dim in (-1, len(shape) - 1)
