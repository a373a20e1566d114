"""Maps that read value states: the compiled model against the same plan applied by definition.

The oracle takes the values and the mask out of the model's own attention and makes the states in a
loop over tokens (``helpers/naive_states.py``); it never uses a cache.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from helpers.dumping import execute, graph_folders, last_file
from helpers.generating import BATCH, CACHE_LENGTH
from helpers.scenarios import (
    CACHES,
    KINDS_OF_CACHES,
    Run,
    compile_with,
    dynamic_run,
    full_inputs,
    full_run,
    generation,
    main_output,
    new_cache,
    subject,
)
from helpers.some_states import MIXED, ROUNDING, SOME, both
from helpers.tiny import text
from models.architectures import ARCHITECTURES

import nbl_compiler as nbl
from nbl_compiler.passes.match_attention import match
from nbl_compiler.value_states import States

BFLOAT16_ROUNDING = 6e-2
MATTERS = 1.0

KINDS = (States(taps=3), States(averages=True), SOME)
# Values that are projected in several steps (MLA) have no value path; and the oracle looks into
# scaled dot-product attention, which the others spell out.
WITHOUT = {"deepseek_v3", "gptj", "bloom"}
FAMILIES = [
    pytest.param(a.name, marks=pytest.mark.xdist_group(a.name))
    for a in ARCHITECTURES
    if a.kind == "decoder" and a.implementations[0] == "sdpa" and a.name not in WITHOUT
]
thorough = pytest.mark.thorough


def assert_equal_within_rounding(run: Run, tolerance: float = ROUNDING) -> None:
    """Check a run against the oracle, and that the oracle could have told a mistake."""
    scale = run.expected.double().std().item()
    torch.testing.assert_close(run.logits, run.expected, atol=tolerance * scale, rtol=0)
    assert (run.dense - run.expected).abs().max() > MATTERS * scale


def every_day(name: str, states: States) -> bool:
    return name == "llama" or (states is MIXED and name in KINDS_OF_CACHES)


@pytest.mark.parametrize(
    ("name", "states"),
    [
        pytest.param(*family.values, s, marks=() if every_day(family.values[0], s) else thorough)
        for family in FAMILIES
        for s in (SOME, MIXED)
    ],
    ids=str,
)
def test_one_pass(name: str, states: States) -> None:
    assert_equal_within_rounding(full_run(name, "sdpa", states=states))


RARE = {("llama", "StaticCache"), ("gemma3", "DynamicCache")}


@pytest.mark.parametrize("name", [p for p in FAMILIES if p.values[0] in KINDS_OF_CACHES])
@pytest.mark.parametrize("cache", [pytest.param("DynamicCache", marks=thorough), "nbl static"])
def test_generation_of_padded_prompts(name: str, cache: str) -> None:
    """Three rows with left padding, 32 steps: prefill and decode agree with one pass."""
    assert_equal_within_rounding(generation(name, "sdpa", cache, padded=True, states=SOME))


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        pytest.param(name, cache, marks=thorough if (name, cache) in RARE else ())
        for name in ("llama", "gemma3")
        for cache in CACHES
    ],
)
def test_generation_with_mixed_values(name: str, cache: str) -> None:
    """Beyond the near buckets, and beyond sliding windows."""
    assert_equal_within_rounding(generation(name, "sdpa", cache, padded=True, states=MIXED))


EACH_KIND = [*(("llama", kind) for kind in KINDS), ("gemma3", SOME), ("mistral", SOME)]
# Each kind with two caches, and each cache with two kinds.
EVERYDAY = {
    ("llama", KINDS[0], "StaticCache"),
    ("llama", KINDS[0], "nbl dynamic"),
    ("llama", KINDS[1], "DynamicCache"),
    ("llama", KINDS[1], "nbl static"),
    ("gemma3", SOME, "DynamicCache"),
    ("mistral", SOME, "StaticCache"),
    ("mistral", SOME, "nbl dynamic"),
}


@pytest.mark.parametrize(
    ("name", "states", "cache"),
    [
        pytest.param(*case, c, marks=() if (*case, c) in EVERYDAY else thorough)
        for case in EACH_KIND
        for c in CACHES
    ],
    ids=str,
)
def test_each_kind_of_state(name: str, states: States, cache: str) -> None:
    """Behind sliding windows too: the runs are several windows long."""
    assert_equal_within_rounding(generation(name, "sdpa", cache, states=states))


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(n, marks=thorough) for n in ("gemma3", "gpt2"))]
)
@both
def test_symbolic_shapes(name: str, states: States) -> None:
    assert_equal_within_rounding(dynamic_run(name, "sdpa", states=states))


@pytest.mark.parametrize(("cache", "states"), [("StaticCache", SOME), ("nbl dynamic", MIXED)])
def test_residual_input(cache: str, states: States) -> None:
    run = generation("llama", "sdpa", cache, input="residual", states=states)
    assert_equal_within_rounding(run)


@pytest.mark.parametrize("name", [pytest.param("llama", marks=thorough), "gemma3"])
@both
def test_bfloat16(name: str, states: States) -> None:
    run = full_run(name, "sdpa", dtype=torch.bfloat16, states=states)
    assert run.logits.dtype == torch.bfloat16
    assert_equal_within_rounding(run, BFLOAT16_ROUNDING)


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        ("gemma2", "nbl static"),
        ("bloom", "StaticCache"),
        ("gptj", "DynamicCache"),
        *(
            pytest.param(*case, marks=thorough)
            for case in (
                ("gemma2", "DynamicCache"),
                ("gemma2", "StaticCache"),
                ("bloom", "DynamicCache"),
                ("bloom", "nbl static"),
                ("gptj", "StaticCache"),
                ("gptj", "nbl static"),
            )
        ),
    ],
)
def test_eager_attention_agrees_with_itself(name: str, cache: str) -> None:
    """Where the oracle cannot look into attention: generation against one compiled pass."""
    one = subject(name, "eager", states=SOME)
    ids = text(batch=2, length=20)
    fast = compile_with(one.model, one.plan)
    past = new_cache(one, cache)
    with torch.no_grad():
        whole = fast(ids, use_cache=False).logits
        dense = one.model(ids, use_cache=False).logits
        parts = [
            fast(ids[:, a:b], past_key_values=past).logits
            for a, b in ((0, 9), *((i, i + 1) for i in range(9, 20)))
        ]
    scale = whole.std().item()
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=ROUNDING * scale, rtol=0)
    assert (whole - dense).abs().max() > MATTERS * scale


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        ("llama", "DynamicCache"),
        ("llama", "nbl dynamic"),
        ("gemma3", "nbl static"),
        *(
            pytest.param(*case, marks=thorough)
            for case in (
                ("llama", "StaticCache"),
                ("llama", "nbl static"),
                ("gemma3", "DynamicCache"),
                ("gemma3", "StaticCache"),
                ("gemma3", "nbl dynamic"),
            )
        ),
    ],
)
def test_prefill_in_pieces(name: str, cache: str) -> None:
    """A chat goes on: further calls of several tokens read what earlier calls stored."""
    check_prefill_in_pieces(name, cache, SOME)


@pytest.mark.parametrize(
    ("name", "cache"),
    [("llama", "nbl static"), pytest.param("gemma3", "nbl dynamic", marks=thorough)],
)
def test_prefill_in_pieces_with_mixed_values(name: str, cache: str) -> None:
    check_prefill_in_pieces(name, cache, MIXED)


def check_prefill_in_pieces(name: str, cache: str, states: States) -> None:
    one = subject(name, "sdpa", states=states)
    ids = text(batch=BATCH, length=24)
    past = new_cache(one, cache)
    fast = compile_with(one.model, one.plan)
    with torch.no_grad():
        expected = one.oracle(ids, use_cache=False).logits
        pieces = [
            fast(ids[:, a:b], past_key_values=past).logits for a, b in ((0, 5), (5, 12), (12, 24))
        ]
    atol = ROUNDING * expected.std().item()
    torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=atol, rtol=0)


@both
def test_packed_documents_do_not_see_one_another(states: States) -> None:
    """Two documents in one row, told apart by their positions: as if each ran alone."""
    one = subject("llama", "sdpa", states=states)
    first, second = text(batch=1, length=9, seed=1), text(batch=1, length=7, seed=2)
    positions = torch.cat([torch.arange(9), torch.arange(7)]).unsqueeze(0)
    fast = compile_with(one.model, one.plan)
    with torch.no_grad():
        packed = fast(torch.cat([first, second], 1), position_ids=positions, use_cache=False).logits
        alone = [one.oracle(ids, use_cache=False).logits for ids in (first, second)]
    expected = torch.cat(alone, 1)
    torch.testing.assert_close(packed, expected, atol=ROUNDING * expected.std().item(), rtol=0)


def test_states_of_another_width_are_refused() -> None:
    one = subject("llama", "sdpa", states=SOME)
    site = one.plan.rewritten[0]
    wrong = {**site.tensors, "taps": site.tensors["taps"][:, :, :-1].contiguous()}
    sites = tuple(replace(s, tensors=wrong) if s is site else s for s in one.plan.sites)
    fast = compile_with(one.model, replace(one.plan, sites=sites))
    with (
        torch.no_grad(),
        pytest.raises(nbl.errors.PlanMismatchError, match=r"taps for model\.layers\.0"),
    ):
        fast(text(batch=1, length=6), use_cache=False)


@pytest.mark.parametrize("name", ["bert", "vit", "deepseek_v3"])
def test_sites_without_a_value_path_say_why(name: str) -> None:
    reasons: list[Any] = []

    def look(graph_module: Any, _: Any) -> Any:
        reasons.extend(one.value_path for one in match(graph_module).found)
        return graph_module.forward

    one = subject(name, "sdpa")
    with torch.no_grad():
        main_output(torch.compile(one.model, backend=look)(**full_inputs(name)))
    wanted = "projected in several steps" if name == "deepseek_v3" else "not causal"
    assert reasons
    assert all(isinstance(reason, str) and wanted in reason for reason in reasons)


@both
def test_dumped_graphs_run_alone(tmp_path: Path, states: States) -> None:
    """Prefill and decode with the plan's own cache, after all passes."""
    one = subject("llama", "sdpa", states=states)
    past = nbl.cache(one.model, one.plan, 16)
    options = {"plan": one.plan, "lowering": "eager", "dump_dir": tmp_path}
    fast = torch.compile(one.model, backend="nbl", options=options)
    with torch.no_grad():
        for part in text(batch=1, length=7).split((6, 1), dim=1):
            fast(part, past_key_values=past)
    folders = graph_folders(tmp_path)
    assert len(folders) == 2
    for folder in folders:
        done = execute(last_file(folder))
        assert done.returncode == 0, done.stderr
    name = "carried_mix(" if states.mixed else "carried_states("
    assert name in last_file(folders[1]).read_text()


def test_monitored_sites_report_what_their_maps_read() -> None:
    model = subject("llama", "sdpa").model
    plan = nbl.calibrate(
        model,
        [text(seed=seed) for seed in range(3)],
        nbl.Config(attention=nbl.Attention(layers=(0, 1), taps=1)),
        progress=False,
    )
    assert all("averages" in site.tensors for site in plan.rewritten)
    fast = compile_with(model, plan)
    with torch.no_grad(), nbl.monitor(fast, warn=False) as monitor:
        fast(text(seed=7), use_cache=False)
    rows = monitor.report()
    assert [row.site for row in rows] == [site.name for site in plan.rewritten]
    assert all(row.tokens == text().numel() for row in rows)


@pytest.mark.parametrize(
    ("cache", "states"),
    [
        pytest.param("StaticCache", SOME, marks=thorough),
        pytest.param("nbl static", SOME, marks=thorough),
        pytest.param("StaticCache", MIXED, marks=thorough),
        ("nbl static", MIXED),
    ],
    ids=str,
)
def test_inductor_computes_the_same(cache: str, states: States) -> None:
    """Prefill over a block of the decaying average, then single tokens."""
    one = subject("llama", "sdpa", states=states)
    ids = text(batch=1, length=CACHE_LENGTH - 2)
    fast = torch.compile(one.model, backend="nbl", options={"plan": one.plan})
    past = new_cache(one, cache)
    first = ids.shape[1] - 3
    with torch.no_grad():
        parts = [
            fast(part, past_key_values=past).logits for part in ids.split((first, 1, 1, 1), dim=1)
        ]
        expected = one.oracle(ids, use_cache=False).logits
    atol = ROUNDING * expected.std().item()
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=atol, rtol=0)
