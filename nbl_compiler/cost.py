"""What a graph costs: floating-point operations and bytes moved, node by node.

A roofline of the whole graph: every matrix product, attention and materialised copy takes the
longer of its arithmetic and its memory time; pointwise work counts as fused into its neighbours.
It predicts *ratios* between two graphs on one machine, which is what a rewrite is judged by.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from nbl_compiler.int8_weights import held_tensors, int8_matrix, is_quantized
from nbl_compiler.lowering.guarded_ffn import unpack_arguments
from nbl_compiler.lowering.guarded_ffn_inductor import GATHER_TOKENS
from nbl_compiler.lowering.int8_linear import int8_linear, streamed_int8_linear
from nbl_compiler.lowering.mixed_values import carried_mix, mixed_values
from nbl_compiler.lowering.predictors import BITS_OF_KIND
from nbl_compiler.lowering.streamed_linear import streamed_linear
from nbl_compiler.lowering.value_states import carried_states, value_states
from nbl_compiler.passes.graph_tools import argument, example_value, is_call, traced_size

_ATTENTION = frozenset({F.scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention})
# Whatever the weights are: a plan's tensors are no parameters of the model.
_PRODUCTS = frozenset(
    {F.linear, torch._C._nn.linear, torch.addmm, torch.mm, torch.matmul, operator.matmul}
    | {torch.bmm, torch.baddbmm}
)
_PRODUCT_METHODS = frozenset({"matmul", "bmm", "mm", "addmm", "baddbmm"})
_COPIES = frozenset({"reshape", "contiguous", "clone", "repeat", "repeat_interleave", "roll"})


@dataclass(frozen=True)
class Work:
    """One node's arithmetic and traffic.

    Args:
        node: Its name.
        flops: Floating-point operations.
        bytes: Bytes read and written.
        streamed: Whether it runs as ``streamed_linear``, at another bandwidth.
        codes: Quantized weights that are unpacked in registers.
        code_bytes: Bytes that hold them, among ``bytes``.
    """

    node: str
    flops: int
    bytes: int
    streamed: bool = False
    codes: int = 0
    code_bytes: int = 0


@dataclass(frozen=True)
class Machine:
    """Rates a machine sustains.

    Args:
        bytes_per_second: Reading weights in a matrix-vector product.
        flops_per_second: In a large matrix product.
        streamed_bytes_per_second: Reading weights in ``streamed_linear``.
        codes_per_second: Reading and unpacking quantized weights; 0 if that is not known, and they
            are taken to be as fast as others of so many bytes.
    """

    bytes_per_second: float
    flops_per_second: float
    streamed_bytes_per_second: float = 0.0
    codes_per_second: float = 0.0

    def seconds(self, work: Work) -> float:
        """Return the roofline time of one node."""
        rate = self.bytes_per_second
        if work.streamed and self.streamed_bytes_per_second:
            rate = self.streamed_bytes_per_second
        reading = (work.bytes - work.code_bytes) / rate
        unpacking = work.codes / self.codes_per_second if self.codes_per_second else 0.0
        reading += max(work.code_bytes / rate, unpacking)
        return max(work.flops / self.flops_per_second, reading)


@dataclass(frozen=True)
class Cost:
    """Everything one graph does."""

    work: tuple[Work, ...] = ()

    @property
    def flops(self) -> int:
        """Floating-point operations of the graph."""
        return sum(w.flops for w in self.work)

    @property
    def bytes(self) -> int:
        """Bytes read and written by the graph."""
        return sum(w.bytes for w in self.work)

    def seconds(self, machine: Machine) -> float:
        """Return the roofline time of the graph on a machine."""
        return sum(map(machine.seconds, self.work))


def graph_cost(graph_module: GraphModule) -> Cost:
    """Count the work of a graph whose nodes carry example values."""
    return Cost(tuple(w for node in graph_module.graph.nodes if (w := _work(node)) is not None))


def _work(node: Node) -> Work | None:
    if is_call(node, {torch.ops.nbl.guarded_ffn.default}):
        return _guarded_work(node)
    if is_call(node, {value_states, carried_states}):
        return _states_work(node)
    if is_call(node, {mixed_values, carried_mix}):
        return _mix_work(node)
    out = example_value(node)
    if not isinstance(out, Tensor):
        return None
    operands = [v for n in node.all_input_nodes if isinstance(v := example_value(n), Tensor)]
    if is_call(node, _ATTENTION):
        query, key = example_value(node.args[0]), example_value(node.args[1])  # type: ignore[arg-type]
        assert isinstance(query, Tensor)
        assert isinstance(key, Tensor)
        flops = 4 * traced_size(prod(query.shape)) * traced_size(key.shape[-2])
        return Work(node.name, flops, _traffic(operands, out))
    if is_call(node, _PRODUCTS, _PRODUCT_METHODS):
        added = is_call(node, {torch.addmm, torch.baddbmm}, {"addmm", "baddbmm"})
        left = argument(node, 1, "mat1") if added else argument(node, 0, "input")
        left = example_value(left) if isinstance(left, Node) else None
        inner = traced_size(left.shape[-1]) if isinstance(left, Tensor) else 0
        return Work(node.name, 2 * traced_size(out.numel()) * inner, _traffic(operands, out))
    if is_call(node, {streamed_linear, int8_linear, streamed_int8_linear}):
        flops = 2 * traced_size(out.numel()) * traced_size(operands[0].shape[-1])
        codes = traced_size(operands[1].numel()) if is_call(node, {streamed_int8_linear}) else 0
        streamed = not is_call(node, {int8_linear})
        return Work(node.name, flops, _traffic(operands, out), streamed, codes, codes)
    if is_call(node, {F.embedding}):
        return Work(node.name, 0, 2 * _bytes(out))
    if is_call(node, (), _COPIES) and _copies(node, operands, out):
        return Work(node.name, 0, _traffic(operands, out))
    return None


def _guarded_work(node: Node) -> Work:
    """A guarded FFN: the fold, the predictor, and the rows that the capacity gathers."""
    values: Any = map_arg(node.args, example_value)  # type: ignore[arg-type]
    x, site = values[0], unpack_arguments(tuple(values[1:]))
    tokens = traced_size(prod(x.shape[:-1]))
    projections = [w for w in (site.gate, site.up) if w is not None]
    few = tokens <= GATHER_TOKENS
    rows = site.selected * tokens if few else site.neurons
    whole = site.predictor_kind == "none" and few
    gathered = [site.down] if whole or site.corrects_by_prediction else [*projections, site.down]
    parts = [site.folded, *site.predictor, *(projections if whole else ())]
    size = site.down.element_size()
    read = sum(map(_bytes, parts)) + sum(rows * traced_size(w.shape[1]) * size for w in gathered)
    per_token = sum(p.numel() for p in parts) + sum(
        (site.selected if few else site.neurons) * traced_size(w.shape[1]) for w in gathered
    )
    bits = BITS_OF_KIND.get(site.predictor_kind) if few else None
    packed = _bytes(site.predictor[0]) if bits else 0
    codes = packed * 8 // bits if bits else 0
    flops = 2 * tokens * int(per_token)
    return Work(node.name, flops, read + 2 * _bytes(x), few, codes, packed)


def _states_work(node: Node) -> Work:
    """Value states: averages read all rows in reach, taps as many as they take."""
    values: Any = map_arg(node.args, example_value)  # type: ignore[arg-type]
    made = example_value(node)
    out = made[0] if isinstance(made, tuple) else made
    assert isinstance(out, Tensor)
    if is_call(node, {carried_states}):
        return Work(node.name, 0, sum(map(_bytes, (values[0], *values[2:4], out))))
    rows, averages = values[0], values[4]
    if not averages:
        return Work(node.name, 0, 2 * _bytes(out))
    single = traced_size(values[2].shape[1]) == 1  # one product with two weights a row
    flops = 4 * traced_size(rows.numel()) if single else 0
    return Work(node.name, flops, _bytes(rows) + _bytes(out))


def _mix_work(node: Node) -> Work:
    """Mixed values: all rows in reach, or the near ones and a sum; a product with the gates."""
    values: Any = map_arg(node.args, example_value)  # type: ignore[arg-type]
    made = example_value(node)
    out = made[0] if isinstance(made, tuple) else made
    assert isinstance(out, Tensor)
    hidden, gates = values[-3], values[-2]
    flops = 2 * traced_size(hidden.numel()) * gates.shape[0] * gates.shape[1]
    flops += 2 * (1 + gates.shape[1]) * traced_size(out.numel())
    if is_call(node, {carried_mix}):
        read = sum(map(_bytes, (values[0], *values[2:4])))
    else:
        read = _bytes(values[0])
        if traced_size(values[2].shape[1]) == 1:  # one product with a weight a row
            flops += 2 * traced_size(values[0].numel()) * gates.shape[0] // values[0].shape[1]
    return Work(node.name, flops, read + _bytes(gates) + _bytes(out))


def _copies(node: Node, operands: list[Tensor], out: Tensor) -> bool:
    if is_call(node, (), {"clone", "repeat", "repeat_interleave", "roll"}):
        return True
    return bool(operands) and not operands[0].is_contiguous() and out.is_contiguous()


def _traffic(operands: list[Tensor], out: Tensor) -> int:
    return sum(_bytes(t) for t in operands) + _bytes(out)


def _bytes(tensor: Tensor) -> int:
    """Bytes a tensor occupies; expanded dimensions (stride 0) occupy none."""
    if is_quantized(tensor):
        read = int8_matrix(tensor)
        return sum(map(_bytes, held_tensors(tensor) if read is None else (read.codes, read.scale)))
    sizes, strides = (map(traced_size, numbers) for numbers in (tensor.shape, tensor.stride()))
    held = prod(n for n, stride in zip(sizes, strides, strict=True) if stride != 0)
    return held * tensor.element_size()
