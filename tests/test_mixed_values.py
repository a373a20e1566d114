"""Maps that read mixed values: the compiled model against the same plan applied by definition."""

from __future__ import annotations

import pytest
import torch
from helpers.scenarios import (
    CACHES,
    KINDS_OF_CACHES,
    Run,
    full_run,
    generation,
)
from models.architectures import ARCHITECTURES

from nbl_compiler.value_states import States

# As in ``test_value_taps``; a softmax over buckets comes on top.
ROUNDING = 1e-4
BFLOAT16_ROUNDING = 6e-2
MATTERS = 1.0
MIXED = States(mixed=True)
WITHOUT = {"deepseek_v3", "gptj", "bloom"}
FAMILIES = [
    pytest.param(a.name, marks=() if a.name in KINDS_OF_CACHES else pytest.mark.thorough)
    for a in ARCHITECTURES
    if a.kind == "decoder" and a.implementations[0] == "sdpa" and a.name not in WITHOUT
]


def assert_equal_within_rounding(run: Run, tolerance: float = ROUNDING) -> None:
    scale = run.expected.double().std().item()
    torch.testing.assert_close(run.logits, run.expected, atol=tolerance * scale, rtol=0)
    assert (run.dense - run.expected).abs().max() > MATTERS * scale


@pytest.mark.parametrize("name", FAMILIES)
def test_one_pass(name: str) -> None:
    assert_equal_within_rounding(full_run(name, "sdpa", states=MIXED))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_generation_of_padded_prompts(name: str, cache: str) -> None:
    """Three rows with left padding, 32 steps, beyond the far bucket's edge and sliding windows."""
    assert_equal_within_rounding(generation(name, "sdpa", cache, padded=True, states=MIXED))
