"""Activation functions as models spell them in FX, recognised by what they compute.

The same function has many spellings::

    F.gelu(x, approximate="tanh")
    0.5 * x * (1.0 + torch.tanh(0.79788456 * (x + 0.044715 * torch.pow(x, 3.0))))
    x * 0.5 * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))

So none is matched as a pattern. From a nonlinear call the walk goes back to the value that it is a
function of, then forward over every elementwise call that depends on that value and on numbers
alone. What leaves this region is run on a fixed grid in float64 and compared with the activations
of ``nbl_compiler.solvers.activations``. Only the pure elementwise calls that
``nbl_compiler.passes.elementwise`` lists are ever run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from nbl_compiler.passes.elementwise import (
    ValueFlow,
    elementwise_name,
    is_nonlinear,
    passed_through,
    reads_metadata,
    run_elementwise,
)
from nbl_compiler.passes.graph_tools import example_value, is_call, is_weight
from nbl_compiler.solvers.activations import ACTIVATION_NAMES, activation

_TOLERANCE = 1e-6
"""Of max(1, |value|): models write constants such as sqrt(2/π) with 8 digits, or in float32. The
known activations differ from each other by 4e-4 and more."""


@dataclass(frozen=True)
class ActivationRegion:
    """Elementwise calls around a nonlinear one.

    Args:
        roots: The values that the region is a function of, in graph order; usually one.
        nodes: The calls, in graph order.
        exits: Those behind a nonlinear one whose values leave the region.
    """

    roots: tuple[Node, ...]
    nodes: tuple[Node, ...]
    exits: tuple[Node, ...]


def find_activations(
    graph_module: GraphModule, flow: ValueFlow, is_source: Callable[[Node], bool]
) -> list[ActivationRegion]:
    """Return the region around every nonlinear call, in graph order.

    ``is_source`` tells at which nodes the walk backward ends even if they are elementwise.
    """
    regions: list[ActivationRegion] = []
    covered: set[Node] = set()
    for node in graph_module.graph.nodes:
        if node in covered or node in flow.constants or not is_nonlinear(node):
            continue
        roots = flow.roots(node, is_source)
        nodes = flow.grow(roots)
        covered.update(nodes)
        regions.append(ActivationRegion(tuple(roots), tuple(nodes), _exits(nodes, flow)))
    return regions


def _exits(nodes: list[Node], flow: ValueFlow) -> tuple[Node, ...]:
    inside, bent = set(nodes), set()
    for node in nodes:
        if is_nonlinear(node) or any(n in bent for n in flow.inputs(node)):
            bent.add(node)
    return tuple(
        node
        for node in nodes
        if node in bent and any(u not in inside and not reads_metadata(u) for u in node.users)
    )


def identify(region: ActivationRegion, result: Node) -> str | None:
    """Return which of ``ACTIVATION_NAMES`` makes ``result`` out of the region's one root.

    None if none of them has the same values on the grid.
    """
    (root,) = region.roots
    values = {root: _probes().clone()}
    with torch.no_grad():
        for node in region.nodes:
            source = passed_through(node)
            if source is None:
                values |= {n: v for n in node.all_input_nodes if (v := _number(n)) is not None}
            operands = node.all_input_nodes if source is None else [source]
            if all(n in values for n in operands):
                values[node] = run_elementwise(node, values) if source is None else values[source]
    found = values.get(result)
    if found is None or found.shape != _probes().shape:
        return None
    return next((name for name in ACTIVATION_NAMES if _same(found, _reference(name))), None)


def describe(region: ActivationRegion, result: Node, flow: ValueFlow) -> str:
    """Say which nonlinear functions make ``result``: "`gelu`, `clip`"."""
    behind: set[Node] = set()
    stack = [result]
    while stack:
        node = stack.pop()
        if node not in behind and node not in region.roots:
            behind.add(node)
            stack.extend(flow.inputs(node))
    nodes = [node for node in region.nodes if node in behind]
    names = dict.fromkeys(f"`{elementwise_name(node)}`" for node in nodes if is_nonlinear(node))
    weights = [n.name for node in nodes for n in node.all_input_nodes if is_weight(n)]
    return ", ".join(names) + (f" with the parameter `{weights[0]}`" if weights else "")


@cache
def _probes() -> Tensor:
    """The grid [N] in float64: dense where activations bend, and far out, where clipping shows."""
    near = torch.linspace(-8, 8, 257, dtype=torch.float64, device="cpu")
    far = torch.logspace(3.1, 8.2, 41, base=2, dtype=torch.float64, device="cpu")
    return torch.cat([-far.flip(0), near, far])


@cache
def _reference(name: str) -> Tensor:
    return activation(name)(_probes())


def _same(found: Tensor, expected: Tensor) -> bool:
    return bool(((found - expected).abs() <= _TOLERANCE * expected.abs().clamp(min=1)).all())


def _number(node: Node) -> Tensor | None:
    """Return the value of ``torch.tensor(0.5)``, and of roots of such, in float64.

    With ``dynamic=True`` Dynamo traces floats that are not literals (``math.pi``) as ``SymFloat``;
    asking for the value makes Dynamo guard on it, which is what a rewrite needs.
    """
    known = example_value(node)
    if isinstance(known, torch.SymFloat):
        return torch.tensor(float(known), dtype=torch.float64, device="cpu")
    given = node.args[0] if node.args else None
    if is_call(node, {torch.tensor}) and type(given) in (int, float):
        return torch.tensor(given, dtype=torch.float64, device="cpu")
    if is_call(node, {torch.sqrt, torch.rsqrt}, {"sqrt", "rsqrt"}) and isinstance(given, Node):
        inner = _number(given)
        return None if inner is None else run_elementwise(node, {given: inner})
    return None
