"""The values of an FFN site's weights, in the convention of ``nn.Linear``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.fx import Node

from nbl_compiler.int8_weights import is_quantized
from nbl_compiler.passes.ffn_sites import FFNMatch, Projection
from nbl_compiler.solvers.folding import FFNWeights


def ffn_weights(match: FFNMatch, value_of: Callable[[Node], Tensor | None]) -> FFNWeights | None:
    """Return views of a site's weights, or None if one of their values is not known.

    Weights that torchao quantized stay as they are: to be read by ``int8_weights``, row by row.

    Args:
        match: The site.
        value_of: Parameter node → its value, or None.
    """
    first = match.up if match.gate is None else match.gate
    w1, b1 = _read(first, value_of)
    w2, b2 = _read(match.down, value_of)
    w_up, b_up = (None, None) if match.gate is None else _read(match.up, value_of)
    if w1 is None or w2 is None or (match.gate is not None and w_up is None):
        return None
    return FFNWeights(match.activation, w1, w2, b1, b2, w_up, b_up)


def _read(
    projection: Projection, value_of: Callable[[Node], Tensor | None]
) -> tuple[Tensor | None, Tensor | None]:
    weight = value_of(projection.weight)
    bias = None if projection.bias is None else value_of(projection.bias)
    if weight is None or (projection.bias is not None and bias is None):
        return None, None
    if is_quantized(weight) and projection.transposed:  # torchao quantizes nn.Linear only
        return None, None
    weight = weight.detach()
    if projection.transposed:
        weight = weight.t()
    bias = None if bias is None else bias.detach()
    if projection.rows is not None:
        rows = slice(*projection.rows)
        weight, bias = weight[rows], None if bias is None else bias[rows]
    return weight, bias


def parameter_value(node: Node) -> nn.Parameter | None:
    """Return the parameter behind a graph input or attribute, as known while Dynamo compiles."""
    if node.op == "get_attr":
        value: object = node.graph.owning_module
        for part in str(node.target).split("."):
            value = getattr(value, part, None)
    else:
        argument = node.meta.get("grapharg")
        value = None if argument is None else argument.example
    return value if isinstance(value, nn.Parameter) else None
