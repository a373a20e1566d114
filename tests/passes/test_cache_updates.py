"""What a linearized layer no longer does: read on the rewritten graphs, not on hope."""

from __future__ import annotations

import pytest
import torch
from helpers.generating import BATCH, PROMPT
from helpers.scenarios import LAYERS, Run, decoder_parameters, decoding
from models.architectures import SLIDING_WINDOW
from torch import Tensor
from torch.fx import GraphModule, Node

import nbl_compiler as nbl
from nbl_compiler.passes.ffn_weights import parameter_value
from nbl_compiler.passes.graph_tools import is_weight, module_path

WITH_CACHES = decoder_parameters()
# Everything that computes, stores or mixes keys and values, in any family's spelling.
STORING = {"index_copy_", "copy_", "cat", "roll", "setitem", "absent_kv"}
MIXING = {"scaled_dot_product_attention", "softmax", "matmul", "bmm", "baddbmm"}
PROJECTING = {"linear", "addmm"}


def operation(node: Node) -> str:
    """Return the bare name of what a node calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def operations_in(graph_module: GraphModule, path: str) -> list[str]:
    """Return what is left of one module's code in a graph."""
    return [
        operation(node)
        for node in graph_module.graph.nodes
        if node.op.startswith("call") and f"{module_path(node)}.".startswith(f"{path}.")
    ]


@pytest.mark.parametrize(("name", "implementation", "cache"), WITH_CACHES)
def test_nothing_of_a_linearized_layer_is_left(name: str, implementation: str, cache: str) -> None:
    run = decoding(name, implementation, cache)
    (linear,), dense = run.subject.linearized, run.subject.sites[1]
    for graph in run.graphs:
        left = operations_in(graph, linear)
        assert not STORING & set(left)
        assert not MIXING & set(left)
        assert [op for op in left if op in PROJECTING] == ["linear"]  # the map itself
        kept = operations_in(graph, dense)
        assert MIXING & set(kept)
        assert STORING & set(kept)


@pytest.mark.parametrize(("name", "implementation", "cache"), WITH_CACHES)
def test_weights_of_a_linearized_layer_are_not_read(
    name: str, implementation: str, cache: str
) -> None:
    run = decoding(name, implementation, cache)
    module = run.subject.model.get_submodule(run.subject.linearized[0])
    own = {id(parameter) for parameter in module.parameters()}
    for graph in run.graphs:
        weights = [n for n in graph.graph.find_nodes(op="placeholder") if is_weight(n)]
        unread = {id(parameter_value(node)) for node in weights if not node.users}
        assert own <= unread


@pytest.mark.parametrize(("name", "implementation", "cache"), WITH_CACHES)
def test_lengths_stay_right(name: str, implementation: str, cache: str) -> None:
    run = decoding(name, implementation, cache)
    seen = PROMPT + run.logits.shape[1] - 1
    assert [int(layer.get_seq_length()) for layer in run.cache.layers] == [seen] * LAYERS


def counters(graph_module: GraphModule) -> int:
    """Count the in-place additions to length counters (whole numbers, no dimensions)."""
    return sum(
        operation(node) == "add_" and node.meta["example_value"].ndim == 0
        for node in graph_module.graph.nodes
    )


@pytest.mark.parametrize(
    ("name", "implementation", "cache"), [p for p in WITH_CACHES if "static" in p.values[2].lower()]
)
def test_length_counters_are_still_advanced(name: str, implementation: str, cache: str) -> None:
    run = decoding(name, implementation, cache)
    for graph, first in zip(run.graphs, (0, PROMPT, SLIDING_WINDOW), strict=False):
        full = [layer for layer in run.cache.layers if layer.is_sliding and first >= SLIDING_WINDOW]
        assert counters(graph) == LAYERS - len(full)  # a full window no longer counts


def storage_bytes(tensor: Tensor | None) -> int:
    """Return the bytes behind a tensor."""
    return 0 if tensor is None else tensor.untyped_storage().nbytes()


@pytest.mark.parametrize(
    ("name", "implementation", "cache"), [p for p in WITH_CACHES if p.values[2].startswith("nbl")]
)
def test_the_plans_own_cache_stores_nothing(name: str, implementation: str, cache: str) -> None:
    run = decoding(name, implementation, cache)
    linear, dense = run.cache.layers
    assert storage_bytes(linear.keys) == storage_bytes(linear.values) == 0
    expected = storage_bytes(dense.keys) + storage_bytes(dense.values)
    assert nbl.cache_bytes(run.cache) == expected > 0


@pytest.mark.parametrize(
    ("name", "implementation", "cache"), [p for p in WITH_CACHES if p.values[2] == "DynamicCache"]
)
def test_a_growing_cache_holds_one_element_for_the_length(
    name: str, implementation: str, cache: str
) -> None:
    """transformers reads the length of a ``DynamicCache`` off the shape of its keys."""
    run = decoding(name, implementation, cache)
    linear = run.cache.layers[0]
    assert linear.keys.shape[0] == BATCH
    assert storage_bytes(linear.keys) == storage_bytes(linear.values) == linear.keys.element_size()
    assert torch.count_nonzero(linear.keys) == 0


def test_a_static_cache_is_left_as_it_was() -> None:
    run: Run = decoding("llama", "sdpa", "StaticCache")
    linear, dense = run.cache.layers
    assert torch.count_nonzero(linear.keys) == torch.count_nonzero(linear.values) == 0
    assert torch.count_nonzero(dense.keys) > 0
