"""What caches hold for maps that read value states, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from helpers.generating import BATCH, CACHE_LENGTH
from helpers.scenarios import compile_with, generation, new_cache, subject
from helpers.some_states import MIXED, ROUNDING, SOME, both
from helpers.tiny import text
from models.architectures import SLIDING_WINDOW

import nbl_compiler as nbl
from nbl_compiler.errors import ConfigError
from nbl_compiler.value_states import MIX_REACH, States


@both
def test_a_dense_prefill_leaves_what_decoding_needs(states: States) -> None:
    """``generate`` with a static cache may run its prefill uncompiled: the cache holds values."""
    one = subject("llama", "sdpa", linearized=(1,), states=states)  # the last: nothing reads it
    ids = text(batch=2, length=10)
    past = new_cache(one, "StaticCache")
    fast = compile_with(one.model, one.plan)
    with torch.no_grad():
        one.model(ids[:, :9], past_key_values=past)
        step = fast(ids[:, 9:], past_key_values=past).logits
        expected = one.oracle(ids, use_cache=False).logits[:, -1:]
    torch.testing.assert_close(step, expected, atol=ROUNDING * expected.std().item(), rtol=0)


@pytest.mark.parametrize("cache", ["nbl dynamic", "nbl static"])
def test_the_plans_own_cache_does_not_grow(cache: str) -> None:
    """Per sequence: two taps and two sums, [heads, 4, head size], whatever the length."""
    run = generation("llama", "sdpa", cache, padded=True, states=SOME)
    linear, dense = run.cache.layers
    width = run.subject.plan.rewritten[0].tensors["taps"].shape[-1]
    stored = sum(tensor.nbytes for tensor in linear.state_tensors)
    assert stored == BATCH * 4 * width * 4
    assert nbl.cache_bytes(run.cache) == stored + dense.keys.nbytes + dense.values.nbytes


def test_mixed_values_keep_the_near_ones_and_a_sum() -> None:
    run = generation("llama", "sdpa", "nbl static", padded=True, states=MIXED)
    linear = run.cache.layers[0]
    assert linear.value_rows.shape[2] == MIX_REACH
    assert linear.value_sums.shape[2] == 1


def test_behind_a_window_the_plans_own_cache_holds_the_window() -> None:
    run = generation("mistral", "sdpa", "nbl static", states=SOME)
    linear = run.cache.layers[0]
    assert linear.value_rows.shape[2] == SLIDING_WINDOW - 1
    assert linear.value_sums.shape[2] == 0


@pytest.mark.parametrize("cache", ["StaticCache", "DynamicCache"])
def test_keys_are_neither_computed_nor_stored(cache: str) -> None:
    run = generation("llama", "sdpa", cache, padded=True, states=SOME)
    for graph in run.graphs:
        names = {n.name for n in graph.graph.nodes if n.op == "placeholder" and n.users}
        read = {part for part in ("q_proj", "k_proj", "v_proj", "o_proj")
                if any("layers_modules_0" in name and part in name for name in names)}  # fmt: skip
        assert read == {"v_proj"}
    assert torch.count_nonzero(run.cache.layers[0].keys) == 0
    assert torch.count_nonzero(run.cache.layers[0].values) > 0


@pytest.mark.parametrize(
    ("cache", "states"),
    [("DynamicCache", SOME), ("nbl dynamic", SOME), ("nbl static", SOME), ("nbl static", MIXED)],
    ids=str,
)
def test_beams_take_their_past_along(cache: str, states: States) -> None:
    """Rows of the cache change places between steps; each must keep its own states."""
    one = subject("llama", "sdpa", states=states)
    ids = text(batch=2, length=12)
    past = new_cache(one, cache)
    fast = compile_with(one.model, one.plan)
    order = torch.tensor([1, 0])
    with torch.no_grad():
        fast(ids[:, :11], past_key_values=past)
        past.reorder_cache(order)
        step = fast(ids[order, 11:], past_key_values=past).logits
        expected = one.oracle(ids[order], use_cache=False).logits[:, -1:]
    torch.testing.assert_close(step, expected, atol=ROUNDING * expected.std().item(), rtol=0)


def test_a_cache_is_emptied_by_reset() -> None:
    one = subject("llama", "sdpa", states=SOME)
    ids = text(batch=2, length=8)
    past = new_cache(one, "nbl static")
    fast = compile_with(one.model, one.plan)
    with torch.no_grad():
        fast(text(batch=2, length=8, seed=5), past_key_values=past)
        past.reset()
        again = fast(ids, past_key_values=past).logits
        expected = one.oracle(ids, use_cache=False).logits
    torch.testing.assert_close(again, expected, atol=ROUNDING * expected.std().item(), rtol=0)


def test_a_cache_with_states_cannot_be_cropped() -> None:
    run = generation("llama", "sdpa", "nbl dynamic", padded=True, states=SOME)
    with pytest.raises(ConfigError, match="cannot be cropped where it holds value states"):
        run.cache.layers[0].crop(-1)


def test_a_cache_made_for_another_plan_is_refused() -> None:
    with_states = subject("llama", "sdpa", states=SOME)
    without = subject("llama", "sdpa")
    ids = text(batch=1, length=6)
    fast = compile_with(with_states.model, with_states.plan)
    with torch.no_grad(), pytest.raises(nbl.errors.NBLError, match="make the cache for the plan"):
        fast(ids, past_key_values=nbl.cache(without.model, without.plan, CACHE_LENGTH))


def test_a_cache_with_states_refuses_the_dense_model() -> None:
    one = subject("llama", "sdpa", states=SOME)
    with torch.no_grad(), pytest.raises(nbl.errors.CacheMismatchError, match="runs dense"):
        one.model(text(batch=1, length=6), past_key_values=nbl.cache(one.model, one.plan, 16))


def test_growing_caches_keep_growing_values_only() -> None:
    tapped = generation("llama", "sdpa", "DynamicCache", padded=True, states=SOME).cache.layers[0]
    assert tapped.keys.shape == tapped.values.shape
    assert tapped.keys.untyped_storage().nbytes() == tapped.keys.element_size()
    assert tapped.values.untyped_storage().nbytes() == tapped.values.numel() * 4
