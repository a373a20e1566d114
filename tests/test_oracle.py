"""The compiled model against the same plan applied by module surgery: equal within rounding.

Both compute the same formula, so nothing but the order of float32 additions may differ. The
oracle never uses a cache: it reads the finished sequence at once.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.generating import PADDING, STEPS
from helpers.recording import rewritten
from helpers.scenarios import (
    Run,
    compile_with,
    decoder_parameters,
    decoding,
    dynamic_run,
    full_inputs,
    full_run,
    generation,
    main_output,
    one_pass,
    spelling_parameters,
    subject,
)
from models.architectures import ARCHITECTURES, BY_NAME, SLIDING_WINDOW

# Relative to the deviation of the logits. A few hundred float32 steps of 2⁻²⁴ (6e-8) each, more
# where attention is sharp; measured: at most 1e-5.
ROUNDING = 1e-4
# bfloat16 keeps 8 bits (4e-3 a step).
BFLOAT16_ROUNDING = 3e-2
# What the plan's random maps do to the logits, on the same scale: a mistake would show.
MATTERS = 1.0


def of_kind(*kinds: str) -> list[Any]:
    """Return the families of these kinds, as parameters."""
    return [
        pytest.param(a.name, marks=pytest.mark.xdist_group(a.name))
        for a in ARCHITECTURES
        if a.kind in kinds
    ]


def preferred(name: str) -> str:
    """Return the spelling of attention that the family's long runs use."""
    return BY_NAME[name].implementations[0]


def assert_equal_within_rounding(run: Run, tolerance: float = ROUNDING) -> None:
    """Check a run against the oracle, and that the oracle could have told a mistake."""
    assert all(set(rewritten(graph)) for graph in run.graphs)
    scale = run.expected.double().std().item()
    torch.testing.assert_close(run.logits, run.expected, atol=tolerance * scale, rtol=0)
    assert (run.dense - run.expected).abs().max() > MATTERS * scale


thorough = pytest.mark.thorough


@pytest.mark.parametrize(("name", "implementation"), spelling_parameters())
def test_one_pass(name: str, implementation: str) -> None:
    """Of decoders the map reads the block's input here, before its norm (where there is one)."""
    assert_equal_within_rounding(one_pass(name, implementation))


@pytest.mark.parametrize("name", of_kind("encoder", "vision", "encoder-decoder"))
def test_residual_input_of_another_shape(name: str) -> None:
    """One graph with symbolic shapes, used for two shapes."""
    assert_equal_within_rounding(dynamic_run(name, preferred(name), input="residual"))


@pytest.mark.parametrize("cache", ["StaticCache", pytest.param("nbl static", marks=thorough)])
@pytest.mark.parametrize("name", ["llama", "gemma3", pytest.param("gpt_neox", marks=thorough)])
def test_residual_input_with_a_cache(name: str, cache: str) -> None:
    run = generation(name, preferred(name), cache, padded=True, input="residual")
    assert_equal_within_rounding(run)


@pytest.mark.parametrize("input", ["normed", "residual"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_bfloat16(name: str, input: str) -> None:
    run = full_run(name, "sdpa", dtype=torch.bfloat16, input=input)
    assert run.logits.dtype == torch.bfloat16
    assert_equal_within_rounding(run, BFLOAT16_ROUNDING)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "modernbert"])
def test_encoders_with_padding(name: str) -> None:
    one = subject(name, "sdpa")
    given = full_inputs(name, batch=3)
    mask = torch.ones_like(given["input_ids"])
    mask[1, -3:] = mask[2, -7:] = 0
    given["attention_mask"] = mask
    with torch.no_grad():
        result = main_output(compile_with(one.model, one.plan)(**given))
        expected = main_output(one.oracle(**given))
    atol = ROUNDING * expected.std().item()
    torch.testing.assert_close(result, expected, atol=atol, rtol=0)


@pytest.mark.parametrize(("name", "implementation", "cache"), decoder_parameters())
def test_decoding(name: str, implementation: str, cache: str) -> None:
    """With the first spelling and the caches of transformers: three rows with left padding, 32
    steps; the layer that counts positions is linear."""
    run = decoding(name, implementation, cache)
    if implementation == preferred(name) and not cache.startswith("nbl"):
        assert run.logits.shape[:2] == (len(PADDING), STEPS + 1)
    assert_equal_within_rounding(run)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "deepseek_v3"])
def test_padded_decoding_with_the_plans_own_cache(name: str) -> None:
    """Absolute positions, ALiBi and rotary positions all follow the mask."""
    assert_equal_within_rounding(generation(name, "sdpa", "nbl static", padded=True))


@pytest.mark.parametrize(
    ("name", "linearized", "layers", "cache"),
    [
        ("mistral", (0,), 2, "nbl dynamic"),
        pytest.param("mistral", (0,), 2, "nbl static", marks=thorough),
        pytest.param("gemma3", (0,), 2, "nbl static", marks=thorough),
        ("gemma3", (1,), 2, "nbl static"),
        pytest.param("gemma3", (0, 1), 4, "nbl dynamic", marks=thorough),
        ("gemma3", (0, 1), 4, "nbl static"),
    ],
)
def test_beyond_the_sliding_window(
    name: str, linearized: tuple[int, ...], layers: int, cache: str
) -> None:
    """Masks are built from the first layer of each kind, whether it stores states or not.

    Gemma 3 alternates: even layers slide, odd layers see everything.
    """
    run = generation(name, "sdpa", cache, padded=True, linearized=linearized, layers=layers)
    assert run.logits.shape[1] > 2 * SLIDING_WINDOW
    assert_equal_within_rounding(run)


@pytest.mark.parametrize("name", of_kind("encoder-decoder"))
@pytest.mark.parametrize("cache", ["DynamicCache", "StaticCache"])
def test_decoder_of_an_encoder_decoder(name: str, cache: str) -> None:
    assert_equal_within_rounding(decoding(name, preferred(name), cache))
