"""How a plan's matrices get into a graph: as floats, or as int8 like the weights they replace."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from nbl_compiler.int8_weights import Int8Matrix, Quantize, is_quantized, quantize_rows
from nbl_compiler.lowering.int8_linear import int8_linear
from nbl_compiler.passes.emit import Emitter
from nbl_compiler.passes.ffn_sites import FFNMatch
from nbl_compiler.passes.graph_tools import example_value
from nbl_compiler.passes.lifting import lift
from nbl_compiler.passes.sites import AttentionMatch
from nbl_compiler.plans import Kind, Plan, Site
from nbl_compiler.value_states import joined_weight


def holds_int8(site: Site, weights: Sequence[Node], quantize: Quantize) -> bool:
    """Tell whether the matrices of a site are to be held as int8.

    Args:
        site: The site. A guarded FFN never does: it gathers rows of the model's own weights.
        weights: The parameters that the site's region reads.
        quantize: ``"auto"``: if all matrices among them are quantized.
    """
    if site.guarded:
        return False
    if quantize != "auto":
        return quantize == "int8"
    values = [v for node in weights if isinstance(v := example_value(node), Tensor)]
    matrices = [value for value in values if value.ndim == 2]
    return bool(matrices) and all(map(is_quantized, matrices))


def lift_matrix(graph_module: GraphModule, name: str, matrix: Tensor | Int8Matrix) -> list[Node]:
    """Bring a matrix into the graph: one input, or codes and scale."""
    if isinstance(matrix, Tensor):
        return [lift(graph_module, name, matrix)]
    return [
        lift(graph_module, f"{name}_codes", matrix.codes),
        lift(graph_module, f"{name}_scale", matrix.scale),
    ]


def emit_linear(emitter: Emitter, x: Node, matrix: Sequence[Node], bias: Node | None) -> Node:
    """Add ``x matrixᵀ + bias`` for a matrix from ``lift_matrix``."""
    layer = F.linear if len(matrix) == 1 else int8_linear
    return emitter.call(layer, x, *matrix, bias)


def rounding_notes(
    plan: Plan, done: Sequence[AttentionMatch | FFNMatch], kind: Kind, quantize: Quantize
) -> tuple[str, ...]:
    """Say of each rewritten site that is held as int8 how far its matrices are from the plan's."""
    sites = ((plan.find(match.site, kind), match.weights) for match in done)
    return tuple(
        f"{site.name}: int8, off by {rounding_error(site):.2g} of the norm"
        for site, weights in sites
        if site is not None and holds_int8(site, weights, quantize)
    )


def rounding_error(site: Site) -> float:
    """Return ‖W − Ŵ‖ / ‖W‖ (Frobenius) of the matrices that a site of a plan adds, as int8."""
    exact = [joined_weight(site.tensors)] if "weight" in site.tensors else []
    exact += [site.tensors["down"]] if "down" in site.tensors else []
    error = sum(float((w - quantize_rows(w).dequantized()).square().sum()) for w in exact)
    return sqrt(error / sum(float(w.square().sum()) for w in exact)) if exact else 0.0
