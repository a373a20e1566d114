"""Find the one hidden state that a region's projections read, and the residual stream behind it."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.fx import Node

from nbl_compiler.passes.graph_tools import (
    Topology,
    example_value,
    is_addition,
    is_call,
    is_cast,
    is_floating,
    is_weight,
    projection_input,
    shape_of,
    skip_views_back,
)

_PRODUCTS = frozenset({operator.mul, torch.mul, operator.sub, torch.sub, operator.truediv})
_NORMS = frozenset({F.layer_norm, F.rms_norm})
_MAX_EXPANSIONS = 8  # MLA needs 3, MLA with adapters 5


@dataclass(frozen=True)
class Refusal:
    """Why an anchor is no site: the node that decides it, and one sentence.

    ``passed`` says how many of the matcher's steps went well before: what came furthest is the
    nearest miss.
    """

    node: Node
    reason: str
    passed: int = 0


@dataclass(frozen=True)
class HiddenState:
    """The hidden state, and the projections that read it or one another."""

    node: Node
    projections: tuple[Node, ...]


@dataclass(frozen=True)
class _Roots:
    """Where an operand comes from: its projections, what they read, and whether the walk
    crossed a residual addition on the way to them."""

    inputs: frozenset[Node]
    projections: frozenset[Node]
    crossed_residual: bool


def find_hidden(operands: Mapping[str, Node], topology: Topology) -> HiddenState | Refusal:
    """Return the hidden state that every operand is projected from.

    Each operand is walked back to its nearest projections. If those read different nodes, the
    latest of them is walked back further (low-rank projections, adapters), never through a
    residual addition, until a single node is left.
    """
    roots = {name: _roots(node, topology) for name, node in operands.items()}
    for name, root in roots.items():
        if not root.inputs:
            return Refusal(operands[name], _unprojected(name, operands[name]))
    inputs = set().union(*(root.inputs for root in roots.values()))
    projections = set().union(*(root.projections for root in roots.values()))
    first_inputs = set(inputs)
    for _ in range(_MAX_EXPANSIONS):
        if len(inputs) == 1:
            break
        latest = max(inputs, key=topology.settled)
        deeper = _roots(latest, topology, through_residual=False)
        if not deeper.inputs or deeper.crossed_residual:
            break
        inputs = (inputs - {latest}) | deeper.inputs
        projections |= deeper.projections
    missing = _missing_projection(operands, first_inputs if len(inputs) > 1 else inputs, topology)
    if missing is not None:
        return missing
    if len(inputs) > 1:
        return _two_inputs(roots, operands, first_inputs)
    ordered = sorted(projections, key=topology.position.__getitem__)
    return HiddenState(inputs.pop(), tuple(ordered))


def ends_walk(node: Node) -> bool:
    """Tell whether a walk back from an operand ends here: at projections, and at sizes.

    With symbolic shapes the sizes of views are read from other tensors; no values come from there.
    """
    sizes = isinstance(example_value(node), torch.Size | torch.SymInt | int)
    return sizes or projection_input(node) is not None


def _roots(start: Node, topology: Topology, *, through_residual: bool = True) -> _Roots:
    """Walk back from ``start`` to the nearest projections (``start`` itself may be one)."""
    own_source = projection_input(start)
    if own_source is not None:
        return _Roots(frozenset({skip_views_back(own_source)}), frozenset({start}), False)
    inputs, projections, crossed = set(), set(), False
    for node in topology.backward(start, stop=ends_walk):
        source = projection_input(node)
        if source is not None:
            inputs.add(skip_views_back(source))
            projections.add(node)
        elif not through_residual and _is_residual_addition(node):
            crossed = True
    return _Roots(frozenset(inputs), frozenset(projections), crossed)


def _is_residual_addition(node: Node) -> bool:
    """Tell whether the node adds two whole activations of the same shape."""
    if not is_addition(node) or len(node.all_input_nodes) != 2:
        return False
    left, right = node.all_input_nodes
    shape = shape_of(node)
    return (
        shape is not None
        and len(shape) >= 2
        and shape_of(left) == shape_of(right) == shape
        and is_floating(left)
        and is_floating(right)
        and not is_weight(left)
        and not is_weight(right)
    )


def _missing_projection(
    operands: Mapping[str, Node], inputs: set[Node], topology: Topology
) -> Refusal | None:
    """Refuse if an operand reads one of the projections' inputs as it is."""
    for hidden in sorted(inputs, key=topology.position.__getitem__):
        for name, node in operands.items():
            bare = _bare_hidden(node, hidden, topology)
            if bare is not None:
                what = "the hidden state" if bare is hidden else f"a second input `{bare.name}`"
                reason = f"missing projection: {name} reads {what} without a projection"
                return Refusal(node, reason)
    return None


def _bare_hidden(operand: Node, hidden: Node, topology: Topology) -> Node | None:
    """Return a hidden state that reaches the operand around every projection, if there is one."""
    if projection_input(operand) is not None:  # one head: nothing lies in between
        return None
    cone = topology.backward(operand, stop=ends_walk)
    width = shape_of(hidden)
    for node in cone:
        if projection_input(node) is not None:
            continue
        if node is hidden:
            return node
        shape = shape_of(node)
        activation = node.op == "placeholder" and is_floating(node) and not is_weight(node)
        if activation and shape == width and width is not None and len(width) >= 2:
            return node
    return None


def _unprojected(name: str, node: Node) -> str:
    if name == "query":
        return "missing projection: the query does not come from a projection in this graph"
    if name in ("key", "value"):
        return (
            f"cross-attention or missing projection: the {name} `{node.name}` does not come from "
            "a projection in this graph"
        )
    return f"missing projection: {name} does not come from a projection in this graph"


def _two_inputs(
    roots: Mapping[str, _Roots], operands: Mapping[str, Node], inputs: set[Node]
) -> Refusal:
    names = ", ".join(f"`{node.name}`" for node in sorted(inputs, key=lambda n: n.name))
    if not roots["query"].inputs <= roots["key"].inputs:
        return Refusal(
            operands["key"],
            "cross-attention: queries and keys are projected from different hidden states "
            f"({names})",
        )
    return Refusal(
        operands["value"],
        f"more than one hidden input: the projections read {names}",
    )


def find_residual(hidden: Node) -> Node:
    """Return the residual stream in front of the norm that made ``hidden``.

    Follows one norm backwards: ``F.layer_norm``, ``F.rms_norm``, or the decomposed spelling
    ``weight * (x * rsqrt(mean(x²) + eps))``. Without a norm, or where the norm's input is read by
    nothing else (post-norm models add to the norm's *output*), that is ``hidden`` itself.
    """
    node, normalised = hidden, False
    while True:
        if is_call(node, _NORMS):
            source = node.args[0]
            assert isinstance(source, Node)
            return _stream_or(hidden, source)
        following = _step_through_norm(node)
        if following is None:
            return _stream_or(hidden, node) if normalised else hidden
        source, statistic = following
        if normalised and not statistic and not is_cast(node):
            return _stream_or(hidden, node)  # a scale in front of the norm belongs to the stream
        node, normalised = source, normalised or statistic


def _stream_or(hidden: Node, source: Node) -> Node:
    same_shape = shape_of(source) == shape_of(hidden)
    return source if same_shape and len(source.users) > 1 else hidden


def _step_through_norm(node: Node) -> tuple[Node, bool] | None:
    """Return (the full-shape input of one step of a norm, whether the step used a statistic)."""
    shape = shape_of(node)
    activations = [n for n in node.all_input_nodes if shape_of(n) == shape and not is_weight(n)]
    if is_cast(node) and activations:
        return activations[0], False
    combines = is_addition(node) or is_call(node, _PRODUCTS, {"mul", "sub", "div"})
    if not combines or len(activations) != 1:
        return None
    others = [n for n in node.all_input_nodes if n is not activations[0]]
    statistic = any((shape_of(n) or (0,))[-1] == 1 for n in others)
    if not others or (not statistic and any(len(shape_of(n) or ()) > 1 for n in others)):
        return None  # a scaled embedding, or two activations: not part of a norm
    return activations[0], statistic
