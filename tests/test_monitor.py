"""``nbl.monitor``: what it counts, and that it costs nothing when it is off."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch._dynamo
from helpers.guard_subjects import EXACT, calls, exact, fresh
from helpers.monitoring import TOLERANCE, by_hand, compilations, quiet, run, subject, traffic
from helpers.own_ffn import compiled_ffn, rows, stream
from helpers.recording import rewritten_graphs
from helpers.tiny import calibrated, compiled, output, text, texts, tiny
from torch import Tensor, nn

import nbl_compiler as nbl
from nbl_compiler.monitoring import watch


@pytest.mark.parametrize(("lowering", "dynamic"), [("eager", True), ("aot_eager", None)])
def test_sums_are_those_of_hooks(lowering: str, dynamic: bool | None) -> None:
    model, plan = subject()
    fast = compiled_ffn(model, plan, lowering=lowering, dynamic=dynamic)
    batches = [1.5 * x + 0.3 for x in traffic()]
    with quiet(fast) as m:
        run(fast, *batches)
    expected = by_hand(model, plan, batches)
    assert [row.site for row in m.report()] == ["layers.0", "layers.1"]
    for row, (shift, energy) in zip(m.report(), expected, strict=True):
        assert row.tokens == 8 * 64 + 1 + 3 * 17
        assert row.shift == pytest.approx(shift, rel=TOLERANCE)
        assert row.energy == pytest.approx(energy, rel=TOLERANCE)
        assert (row.outliers, row.dense_tokens, row.outliers_per_token) == (0, 0, 0.0)


def test_the_calibration_text_itself_has_neither_shift_nor_energy() -> None:
    model, plan = subject()
    fast = compiled_ffn(model, plan)
    with quiet(fast) as m:
        run(fast, *stream())
    first = m.report()[0]  # nothing that the plan changes lies in front of it
    assert first.shift == pytest.approx(0, abs=TOLERANCE)
    assert first.energy == pytest.approx(1, abs=TOLERANCE)


@pytest.mark.parametrize("form", EXACT)
def test_guards_are_counted_as_by_hand(form: str) -> None:
    one = fresh(exact(form))
    fast = compiled_ffn(one.model, one.plan, dynamic=True)
    run(fast, *calls(3))  # must not count
    with quiet(fast) as m:
        run(fast, *calls(5))
    expected = one.count(calls(5))
    for row in m.report():
        counts = expected[row.site]
        assert (row.tokens, row.outliers) == (counts.tokens, counts.outliers)
        assert row.dense_tokens == counts.dense_tokens > 0
        assert row.outliers_per_token == pytest.approx(counts.outliers_per_token)
        assert row.dense_share == pytest.approx(counts.dense_share)
    whole = one.count([*calls(3), *calls(5)])
    assert nbl.guard_counts(one.plan) == whole  # which go on as if nobody watched


@pytest.mark.parametrize("input", ["normed", "residual"])
def test_attention_is_watched_where_its_map_reads(input: str) -> None:
    model = tiny()
    plan = calibrated(model, layers=(0,), input=input, holdout=0.0)
    seen: list[Tensor] = []
    layer = model.model.layers[0]
    part = layer.self_attn if input == "normed" else layer

    def remember(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    def inputs(*batches: Tensor) -> Tensor:
        seen.clear()
        for ids in batches:
            output(model, ids)
        return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen]).double()

    hook = part.register_forward_pre_hook(remember, with_kwargs=True)
    before, now = inputs(*texts()), inputs(text(seed=11))
    hook.remove()
    z = (now - before.mean(0)) / before.std(0, correction=0)
    fast = compiled(model, strict=True)
    with quiet(fast) as m:
        output(fast, text(seed=11))
    (row,) = m.report()
    assert (row.site, row.kind, row.tokens) == (plan.rewritten[0].name, "attention", len(now))
    assert row.shift == pytest.approx(float(z.mean(0).square().mean().sqrt()), rel=TOLERANCE)
    assert row.energy == pytest.approx(float(z.square().mean()), rel=TOLERANCE)


def test_prefill_and_decode_are_added_up() -> None:
    model = tiny()
    plan = calibrated(model, layers=(1,))
    fast = compiled(model)
    ids = text(1, 12)
    with quiet(fast) as m, torch.no_grad():
        kv = nbl.cache(model, plan, max_cache_len=32, implementation="static")
        fast(input_ids=ids, past_key_values=kv)
        for _ in range(5):
            fast(input_ids=ids[:, :1], past_key_values=kv)
    assert [row.tokens for row in m.report()] == [12 + 5]


# That the model stays what it is.


@pytest.mark.parametrize("lowering", ["eager", "aot_eager"])
def test_outputs_are_the_same_to_the_bit(lowering: str) -> None:
    one = fresh(exact("true"))
    fast = compiled_ffn(one.model, one.plan, lowering=lowering)
    before = run(fast, *traffic())
    with quiet(fast):
        inside = run(fast, *traffic())
    for x, y in zip(before, inside, strict=True):
        assert torch.equal(x, y)


def test_inductor_counts_the_same_in_one_graph() -> None:
    one = fresh(exact("true", layers=1))
    options = {"plan": one.plan, "lowering": "inductor"}
    fast = torch.compile(one.model, backend="nbl", fullgraph=True, options=options)
    batches = [1.5 * rows(1, 8, seed=seed) for seed in range(3)]
    outside = run(fast, *batches)
    with quiet(fast) as m:
        inside = run(fast, *batches)
    plain = fresh(exact("true", layers=1))
    eager = compiled_ffn(plain.model, plain.plan)
    with quiet(eager) as reference:
        run(eager, *batches)
    for x, y in zip(outside, inside, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=TOLERANCE)
    (row,), (expected,) = m.report(), reference.report()
    assert (row.tokens, row.outliers) == (24, expected.outliers)
    assert row.dense_tokens == expected.dense_tokens > 0
    assert row.shift == pytest.approx(expected.shift, rel=TOLERANCE)
    assert row.energy == pytest.approx(expected.energy, rel=TOLERANCE)


def test_a_model_that_is_not_monitored_runs_the_graph_it_always_ran() -> None:
    model, plan = subject()
    fast, x = compiled_ffn(model, plan), rows()
    with rewritten_graphs() as graphs:
        run(fast, x)
        with quiet(fast):
            run(fast, x)
    plain, watched = ([str(n.target) for n in g.graph.nodes] for g in graphs)
    added = [name for name in watched if name not in plain]
    assert len(watched) > len(plain)
    assert [name for name in plain if name not in watched] == []
    assert any("add_inputs" in name for name in added)


def test_switching_compiles_once() -> None:
    model, plan = subject()
    fast, x = compiled_ffn(model, plan), rows()
    m = quiet(fast)
    with compilations() as count:
        run(fast, x)
        with m:
            run(fast, x, x)
    assert count == [2]
    with compilations() as count:
        for _ in range(3):
            run(fast, x)
            with m:
                run(fast, x)
            with quiet(fast):
                run(fast, x)
    assert count == [0]


def test_what_is_compiled_inside_is_left_behind_outside() -> None:
    model, plan = subject()
    fast = compiled_ffn(model, plan)
    with quiet(fast) as m:
        first = run(fast, *traffic())
    before = m.report()
    for x, y in zip(first, run(fast, *traffic()), strict=True):
        assert torch.equal(x, y)
    assert m.report() == before


def test_leaving_stops_counting_and_entering_starts_at_zero() -> None:
    model, plan = subject()
    fast = compiled_ffn(model, plan)
    m = quiet(fast)
    for seed, batch in ((1, rows(2, 5)), (2, rows(3, 7, seed=2))):
        with m:
            run(fast, batch)
        done = m.report()
        run(fast, rows(4, 4, seed=seed))
        assert m.report() == done
        assert {row.tokens for row in done} == {batch[..., 0].numel()}


def test_graphs_and_sums_go_with_the_compiled_code() -> None:
    gc.collect()
    before = len(watch._graphs)
    model, plan = subject()
    fast = compiled_ffn(model, plan)
    with quiet(fast) as m:
        run(fast, rows())
        torch._dynamo.reset()  # what was counted by code that is gone still counts
        run(fast, rows())
        assert {row.tokens for row in m.report()} == {2 * 8 * 64}
    assert len(watch._graphs) > before
    del fast, m
    torch._dynamo.reset()
    gc.collect()
    assert len(watch._graphs) == before
    assert watch._subjects == []
