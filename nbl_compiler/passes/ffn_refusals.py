"""Why an activation that has to do with linear layers is no FFN site.

Each function returns a refusal, or None where nothing looks like an FFN: an activation is listed
as rejected only if its value comes from one projection and goes to another of the right width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from nbl_compiler.passes.activation_calls import ActivationRegion, describe, identify
from nbl_compiler.passes.elementwise import ValueFlow, reads_metadata, skip_passes
from nbl_compiler.passes.ffn_region import Path, layers_beyond
from nbl_compiler.passes.ffn_sites import (
    Projection,
    is_projection,
    layer_behind,
    linear_source,
    read_projection,
)
from nbl_compiler.passes.graph_tools import module_path, shape_of, skip_views_back
from nbl_compiler.passes.hidden_state import Refusal
from nbl_compiler.solvers.activations import ACTIVATION_NAMES


@dataclass(frozen=True)
class Candidate:
    """An activation, and where its value goes.

    Args:
        region: The calls that compute the activation.
        result: The last of them.
        path: From there to the down projection.
        layers: What computed the region's roots.
    """

    region: ActivationRegion
    result: Node
    path: Path
    layers: tuple[Node, ...]

    @property
    def landmarks(self) -> set[Node]:
        """The nodes that no other site shares."""
        return {*self.layers, *(n for n in (self.path.product, self.path.down) if n is not None)}


def width(node: Node) -> object:
    """Return the size of the node's last dimension, if it has one."""
    shape = shape_of(node)
    return shape[-1] if shape else None


def no_parameter(layer: Node) -> Refusal:
    """Refuse a linear layer whose weight or bias is computed, or is no parameter."""
    reason = f"the weight of `{layer.name}` is not a parameter"
    return Refusal(layer, f"{reason} (merge adapters first; quantized layers do not match)")


def unknown_activation(candidate: Candidate, flow: ValueFlow) -> Refusal:
    """Refuse an activation that is none of those with known mathematics."""
    functions = describe(candidate.region, candidate.result, flow)
    reason = f"unknown activation: {functions} (known: {', '.join(ACTIVATION_NAMES)})"
    return Refusal(skip_passes(candidate.result), reason)


def without_projection(candidate: Candidate) -> Refusal | None:
    """Refuse an activation that leads to a projection but does not act on exactly one."""
    path, roots = candidate.path, candidate.region.roots
    if path.down is None:
        return None
    if len(roots) == 1 and roots[0].op == "placeholder":
        if path.factor is None or read_projection(path.factor) is not None:
            reason = f"missing projection: the activation reads `{roots[0].name}` from elsewhere"
            return Refusal(roots[0], reason)
        return None
    sources = [linear_source(layer) for layer in candidate.layers]
    if not any(s is not None and width(s) == width(path.down) for s in sources):
        return None
    if len(roots) == 1:
        layer = candidate.layers[0]
        if read_projection(layer) is None:
            return no_parameter(layer)
        return Refusal(roots[0], f"`{roots[0].name}` rearranges the outputs of `{layer.name}`")
    if all(sources):
        names = ", ".join(f"`{layer.name}`" for layer in candidate.layers)
        return Refusal(
            candidate.layers[-1],
            f"the activation reads several projections: {names} (merge adapters first)",
        )
    return None


def odd_factor(path: Path, gate: Projection, flow: ValueFlow) -> Refusal | None:
    """Refuse a gate that multiplies something else than a projection of the hidden state."""
    assert path.factor is not None
    if path.down is None or width(path.down) != width(gate.source):
        return None
    roots = flow.roots(path.factor, is_projection)
    if [root.op for root in roots] == ["placeholder"]:
        return Refusal(
            roots[0], f"missing projection: the gate multiplies `{roots[0].name}` from elsewhere"
        )
    sources = [linear_source(layer_behind(root)) for root in roots]
    hidden = skip_views_back(gate.source)
    if not all(sources) or not any(s and skip_views_back(s) is hidden for s in sources):
        return None  # the gate of attention or of a state-space model
    return Refusal(
        path.factor,
        f"the gate multiplies `{path.factor.name}`, which is not just a projection (merge adapters "
        "first)",
    )


def without_down(candidate: Candidate, inner: Projection, flow: ValueFlow) -> Refusal | None:
    """Refuse an activation whose value enters no projection, or enters one in a roundabout way."""
    path = candidate.path
    beyond = [n for n in layers_beyond(path.end, flow) if width(n) == width(inner.source)]
    reader = next((user for user in path.end.users if not reads_metadata(user)), None)
    if beyond and reader is not None:
        what = f"`{reader.name}` ({module_path(reader)})" if module_path(reader) else reader.name
        reason = f"{what} lies between the activation and the down projection `{beyond[0].name}`"
        return Refusal(reader, reason)
    other = None if path.factor is None else read_projection(path.factor)
    if other is None:
        lost = reader is not None and reader.op == "output"
    else:
        lost = skip_views_back(other.source) is skip_views_back(inner.source)
    if lost and identify(candidate.region, candidate.result) is not None:
        return Refusal(path.end, f"missing down projection: `{path.end.name}` enters none")
    return None


def other_width(down: Node, inner: Projection) -> Refusal:
    widths = f"{width(down)} where the hidden state's is {width(inner.source)}"
    return Refusal(down, f"the output's width is {widths}: a head or projector, not an FFN")
