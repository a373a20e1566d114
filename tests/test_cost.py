"""Counting arithmetic and bytes."""

from __future__ import annotations

import torch
from torch import nn

import nbl_compiler as nbl
from nbl_compiler.cost import Machine, Work, graph_cost


def cost_of(module: nn.Module, *args: torch.Tensor):
    costs = []

    def backend(graph_module, example_inputs):
        costs.append(graph_cost(graph_module))
        return graph_module.forward

    with torch.no_grad():
        torch.compile(module, backend=backend)(*args)
    (cost,) = costs
    return cost


def test_a_linear_layer():
    cost = cost_of(nn.Linear(32, 48), torch.randn(5, 32))
    assert cost.flops == 2 * 5 * 32 * 48
    assert cost.bytes == 4 * (5 * 32 + 32 * 48 + 48 + 5 * 48)


def test_attention_and_expanded_keys():
    class Grouped(nn.Module):
        def forward(self, q, k):
            wide = k[:, :, None].expand(1, 2, 3, 16, 8).reshape(1, 6, 16, 8)
            return nn.functional.scaled_dot_product_attention(q, wide, wide)

    q, k = torch.randn(1, 6, 4, 8), torch.randn(1, 2, 16, 8)
    cost = cost_of(Grouped(), q, k)
    wide, narrow = 4 * 6 * 16 * 8, 4 * 2 * 16 * 8
    assert cost.flops == 4 * q.numel() * 16
    # the copy that repeats the keys, then attention (one wide tensor is both keys and values)
    assert cost.bytes == (narrow + wide) + (4 * q.numel() + wide + 4 * q.numel())


def test_a_plans_maps_are_counted():
    """A map of d × d in place of each of both; its weights are no parameters of the model."""
    from models.architectures import HIDDEN, inputs, make

    model = make("llama")
    tokens = 2 * 16
    plan = nbl.calibrate(
        model,
        [inputs("llama", 4, 64)["input_ids"]],
        nbl.Config(attention=nbl.Attention(layers=(1,)), ffn=nbl.FFN(layers=(0,), keep=0)),
        progress=False,
    )
    given = inputs("llama", 2, 16)
    (graph,) = nbl.explain(model, **given, plan=plan, use_cache=False).graphs
    removed = sum(site.details["parameters"] for site in plan.rewritten)
    attention = 4 * tokens * HIDDEN * 16  # scores and mix over 16 keys
    saved = graph.before.flops - graph.after.flops
    assert saved == 2 * tokens * (removed - 2 * HIDDEN * HIDDEN) + attention


def test_the_roofline_takes_the_longer_of_arithmetic_and_memory():
    cost = cost_of(nn.Linear(32, 48), torch.randn(5, 32))
    slow_memory, slow_arithmetic = Machine(1.0, 1e30), Machine(1e30, 1.0)
    assert cost.seconds(slow_memory) == cost.bytes
    assert cost.seconds(slow_arithmetic) == cost.flops


def test_a_rewrite_costs_less_than_what_it_replaces():
    from models.architectures import inputs, make

    model = make("llama")
    batches = [inputs("llama", 4, 64, seed=s)["input_ids"] for s in range(2)]
    config = nbl.Config(attention=nbl.Attention(count=2))
    plan = nbl.calibrate(model, batches, config, progress=False)
    (graph,) = nbl.explain(model, **inputs("llama"), plan=plan, use_cache=False).graphs
    assert graph.after.flops < graph.before.flops
    assert graph.after.bytes < graph.before.bytes
    assert len(graph.rewritten) == 2


def test_codes_take_the_longer_of_reading_and_unpacking():
    """A layer of floats beside 50 codes in 25 bytes: the two parts follow each other."""
    work = Work("guarded", flops=10, bytes=125, streamed=True, codes=50, code_bytes=25)
    assert Machine(1.0, 1e30, 5.0).seconds(work) == 125 / 5
    assert Machine(1.0, 1e30, 5.0, codes_per_second=50.0).seconds(work) == 125 / 5
    assert Machine(1.0, 1e30, 5.0, codes_per_second=5.0).seconds(work) == 100 / 5 + 50 / 5


def test_the_codes_of_a_guard_are_counted():
    from models.architectures import HIDDEN, inputs, make

    model = make("llama")
    batches = [inputs("llama", 4, 64)["input_ids"]]
    form = nbl.FFN(layers=(0,), keep=0, guard="predicted", predictor="quantized_4", capacity=0.2)
    plan = nbl.calibrate(model, batches, nbl.Config(None, form), progress=False)
    (site,) = plan.rewritten
    given = {"input_ids": torch.ones(1, 1, dtype=torch.long), "use_cache": False}
    (graph,) = nbl.explain(model, **given, plan=plan).graphs
    (work,) = (w for w in graph.after.work if w.codes)
    rows = 2 * site.details["neurons"]  # of gate and up
    assert work.codes == rows * HIDDEN
    assert work.code_bytes == rows * HIDDEN // 2
    assert work.streamed
