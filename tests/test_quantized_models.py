"""Plans on models that torchao quantized: equal to surgery with dequantized weights."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.ffn_surgery import LAYOUTS, fold_by_surgery
from helpers.generating import CACHE_LENGTH, generate, logits_of, prompt
from helpers.quantizing import (
    Subject,
    attention_held,
    dequantized,
    held,
    oracle_of,
    quantized,
    subject,
)
from helpers.recording import rewritten_graphs
from helpers.tiny import compiled, output, text, texts, tiny
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.fx import GraphModule
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    PerGroup,
)
from transformers import StaticCache

import nbl_compiler as nbl
from nbl_compiler import backend
from nbl_compiler.cost import graph_cost
from nbl_compiler.errors import ConfigError, NBLWarning, UnsupportedDtypeError
from nbl_compiler.passes.lifting import lifted_tensors

# Relative to the deviation of the logits: float32 in another order. Measured: at most 5e-6.
ROUNDING = 3e-5
# What the plan does to the logits, on the same scale: a mistake would show.
MATTERS = 0.5
FAMILIES = ("llama", "gemma3", "gpt_neox", "opt")
thorough = pytest.mark.thorough


def assert_same(result: Tensor, expected: Tensor) -> None:
    scale = expected.double().std().item()
    torch.testing.assert_close(result, expected, atol=ROUNDING * scale, rtol=0)


def matrices(graph: GraphModule) -> list[torch.dtype]:
    """Return the dtypes of the plan's matrices in a graph."""
    return [tensor.dtype for tensor in lifted_tensors(graph) if tensor.ndim == 2]


def decoded(one: Subject, model: nn.Module, **options: Any) -> Any:
    """Generate with a static cache, prefill and steps compiled."""
    model.forward = torch.compile(
        model.forward, backend="nbl", options={"lowering": "eager", "plan": one.plan, **options}
    )
    try:
        past = StaticCache(config=model.config, max_cache_len=CACHE_LENGTH)
        with torch.no_grad():
            return generate(model, prompt(one.name, padded=True), 4, past_key_values=past)
    finally:
        del model.forward


@pytest.mark.parametrize("name", FAMILIES)
def test_prefill_and_decode_with_a_static_cache(name: str) -> None:
    one = subject(name)
    with rewritten_graphs() as graphs:
        result = decoded(one, one.quantized)
    with torch.no_grad():
        expected = logits_of(one.oracle, result.sequences, prompt(name, padded=True), 4)
        dense = logits_of(one.model, result.sequences, prompt(name, padded=True), 4)
    assert graphs
    # The map of attention; the kept rows with the map below them, and their columns.
    assert all(matrices(graph) == [torch.int8] * 3 for graph in graphs)
    assert_same(torch.stack(result.logits, dim=1), expected)
    assert (dense - expected).abs().max() > MATTERS * expected.std()


@pytest.mark.parametrize("tokens", [1, pytest.param(16, marks=thorough), 20])
def test_inductor(tokens: int) -> None:
    """Streamed, streamed for the most tokens that are, and by a matrix product."""
    one = subject("llama")
    ids = text(batch=1, length=tokens)
    result = output(compiled(one.quantized, plan=one.plan, lowering="inductor"), ids)
    assert_same(result, output(one.oracle, ids))


def test_no_matrix_is_dequantized_into_memory() -> None:
    """One token: every buffer of the generated code is smaller than the smallest matrix."""
    one = subject("llama")
    fast = compiled(one.quantized, plan=one.plan, lowering="inductor")
    with fresh_cache(), torch.no_grad():
        _, codes = run_and_get_code(fast, text(batch=1, length=1), use_cache=False)
    sizes = [
        torch.Size(map(int, re.findall(r"\d+", shape))).numel()
        for code in codes
        for shape in re.findall(r"empty_strided_cpu\(\(([\d, ]*)\)", code)
    ]
    matrix = min(p.numel() for p in one.quantized.parameters() if p.ndim == 2)
    assert sizes
    assert max(sizes) < matrix


@pytest.mark.parametrize("lowering", ["eager", pytest.param("inductor", marks=thorough)])
def test_bfloat16(lowering: str) -> None:
    """No further from the exact result than plain bfloat16 with dequantized weights is."""
    one = subject("llama", torch.bfloat16)
    ids = text(batch=1, length=8)
    result = output(compiled(one.quantized, plan=one.plan, lowering=lowering), ids)
    assert result.dtype == torch.bfloat16
    exact = output(one.oracle, ids)
    plain = output(oracle_of("llama", one.quantized, one.plan, torch.bfloat16), ids)
    assert (result - exact).norm() < 1.2 * (plain - exact).norm()


@pytest.mark.parametrize("states", [{"taps": 1}, {"mixed": True}], ids=str)
def test_value_states(states: dict[str, Any]) -> None:
    one = subject("llama", **states)
    ids = text(batch=2, length=12)
    assert_same(output(compiled(one.quantized, plan=one.plan), ids), output(one.oracle, ids))


def test_one_plan_serves_the_model_before_and_after() -> None:
    """Nothing that was made for float weights is used for int8, or the other way round."""
    one = subject("llama")
    ids = text()
    exact = fold_by_surgery(one.model, one.plan, LAYOUTS["llama"])
    for model, oracle in ((one.model, exact), (one.quantized, one.oracle), (one.model, exact)):
        assert_same(output(compiled(model, plan=one.plan), ids), output(oracle, ids))


def test_matrices_as_asked_for() -> None:
    one = subject("llama")
    ids = text()
    exact = fold_by_surgery(one.model, one.plan, LAYOUTS["llama"])
    with rewritten_graphs() as graphs:
        output(compiled(one.model, plan=one.plan, quantize="int8"), ids)
        left = output(compiled(one.quantized, plan=one.plan, quantize="off"), ids)
    assert [matrices(graph) for graph in graphs] == [[torch.int8] * 3, [torch.float32] * 3]
    # "off" leaves the maps alone, and the other layers are quantized all the same
    assert not torch.allclose(left, output(exact, ids), atol=1e-3)
    assert not torch.allclose(left, output(one.oracle, ids), atol=1e-4)
    with pytest.raises(ConfigError, match=r"quantize='int4' must be one of auto, int8, off"):
        output(compiled(one.model, plan=one.plan, quantize="int4"), ids)


def test_layers_that_stay_dense_keep_dense_maps() -> None:
    """GPT-2's Conv1D, which torchao does not quantize."""
    model = tiny("gpt2")
    plan = nbl.calibrate(model, texts(), nbl.Config(nbl.Attention(layers=(0,))), progress=False)
    twin = quantized(model)
    twin.lm_head.weight = copy.deepcopy(model.lm_head.weight)
    with rewritten_graphs() as graphs:
        result = output(compiled(twin, plan=plan), text())
    assert matrices(graphs[0]) == [torch.float32]
    torch.testing.assert_close(result, output(compiled(model, plan=plan), text()))


@pytest.mark.filterwarnings("ignore:backend=:nbl_compiler.errors.NBLWarning")
def test_without_a_plan_nothing_changes() -> None:
    one = subject("llama")
    ids = text()
    assert torch.equal(output(compiled(one.quantized), ids), output(one.quantized, ids))
    other = quantized(one.model)
    backend._warned.clear()
    with pytest.warns(NBLWarning, match="found no plan"):
        output(compiled(other), ids)


def test_bytes_are_counted_as_held() -> None:
    layer = nn.Linear(32, 48)
    found: list[int] = []

    def look(graph_module: GraphModule, _: Any) -> Callable[..., Any]:
        found.append(graph_cost(graph_module).bytes)
        return graph_module.forward

    with torch.no_grad():
        torch.compile(quantized(nn.Sequential(layer)), backend=look)(torch.randn(5, 32))
    assert found == [4 * (5 * 32 + 48 + 5 * 48) + 32 * 48 + 4 * 48]


def test_explain_counts_a_site_as_int8() -> None:
    one = subject("llama")
    site = one.plan.rewritten[0]
    report = nbl.explain(one.quantized, text(1, 1), plan=one.plan, use_cache=False)
    (row,) = (row for row in report.rows if row.site == site.name)
    rows, width = site.tensors["weight"].shape
    # codes; scale, bias and the token's output in float32; the token's input
    assert row.after.bytes == rows * width + 4 * (3 * rows + width)


def test_released_weights() -> None:
    one = subject("llama")
    model = quantized(one.model)
    before = output(compiled(model, plan=one.plan), text())
    bytes_before = nbl.resident_bytes(model)
    done = nbl.release(model, one.plan)
    weights = [p for n, p in one.quantized.named_parameters() if n in done.parameters]
    assert len(weights) == 4 + 3
    # codes, zero points, scales
    assert done.bytes == sum(w.numel() + (1 + 4) * w.shape[0] for w in weights)
    stand_ins = len(weights) * (1 + 1 + 4)
    assert nbl.resident_bytes(model) == bytes_before - done.bytes + stand_ins
    assert torch.equal(output(compiled(model, plan=one.plan), text()), before)


def test_calibration_comes_first() -> None:
    model = subject("llama").quantized
    with pytest.raises(UnsupportedDtypeError, match=r"q_proj\.weight is quantized; calibrate the"):
        nbl.calibrate(model, texts(), progress=False)


def test_a_guard_needs_float_rows() -> None:
    model = tiny("llama")
    ffn = nbl.FFN(layers=(1,), keep=0.25, guard="predicted", capacity=0.3)
    config = nbl.Config(attention=nbl.Attention(layers=(0,)), ffn=ffn)
    plan = nbl.calibrate(model, texts(), config, progress=False)
    with pytest.raises(UnsupportedDtypeError, match=r'1\.mlp is folded with a guard.*"off"'):
        output(compiled(quantized(model), plan=plan), text())
    dense_ffns = quantized(model, which=lambda m, n: isinstance(m, nn.Linear) and "mlp" not in n)
    oracle = fold_by_surgery(dequantized(dense_ffns), attention_held(plan), LAYOUTS["llama"])
    assert_same(output(compiled(dense_ffns, plan=plan), text()), output(oracle, text()))


@pytest.mark.parametrize(
    "scheme",
    [
        Int8WeightOnlyConfig(granularity=PerGroup(16), set_inductor_config=False),
        Int8DynamicActivationInt8WeightConfig(set_inductor_config=False),
    ],
)
def test_other_schemes_are_refused(scheme: Any) -> None:
    one = subject("llama")
    with pytest.raises(UnsupportedDtypeError, match=r"is a Int8Tensor that a plan cannot"):
        output(compiled(quantized(one.model, scheme), plan=one.plan), text())


def test_the_rounding_error_of_maps_is_told() -> None:
    """It is large enough for the oracle to tell float maps from int8 ones."""
    one = subject("llama")
    reports: list[Any] = []
    output(compiled(one.quantized, plan=one.plan, report=reports.append), text())
    notes = [note for run in reports[0].runs for note in run.report.notes if "int8" in note]
    linear, folded = one.plan.rewritten
    exact, rounded = (plan.rewritten[0].tensors["weight"] for plan in (one.plan, held(one.plan)))
    off = ((exact - rounded).norm() / exact.norm()).item()
    assert off > 1e-3
    assert notes[0] == f"{linear.name}: int8, off by {off:.2g} of the norm"
    assert notes[1].startswith(f"{folded.name}: int8, off by 0.00")
