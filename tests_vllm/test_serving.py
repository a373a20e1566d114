"""A plan in vLLM gives what the same plan gives in transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engines import IN_THIS_PROCESS, Served, run_in_transformers, serve
from tiny_plans import LAYERS, NEURONS, make_model, random_plan, save

from nbl_compiler.plans import Plan
from nbl_compiler.serving.export import export

# float32 log-probabilities of another order of summation, four layers deep: 2.4e-5 was seen.
LOGPROB_TOLERANCE = 1e-4
# Of a log-probability: what a map that is not applied would miss by, at least.
FAR = 1.0

EVERY_FORM = {0: 11, 2: 0, 3: NEURONS}  # some neurons kept (an odd number), none, all
CASES = {
    "Llama": {"attention": (1, 2), "residual": (2,), "ffn": EVERY_FORM},
    "Mistral": {"attention": (0,), "residual": (0,), "ffn": {1: 24}},
    "Qwen2": {"attention": (0, 3)},
    "Qwen3": {"ffn": EVERY_FORM, "guarded": (1,)},
    "Gemma2": {"attention": (1,), "residual": (1,), "ffn": EVERY_FORM},
    "Gemma3Text": {"attention": (1, 2), "residual": (2,), "ffn": EVERY_FORM},
}


def assert_same(served: Served, expected: Served) -> None:
    for found, wanted in zip(served.logprobs, expected.logprobs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=LOGPROB_TOLERANCE)
    assert served.tokens == served.again == expected.tokens


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Served]:
    """The dense Llama: its folder, and what vLLM makes of it by itself."""
    folder = save(make_model("Llama"), tmp_path_factory.mktemp("stock"))
    return folder, serve(folder, **IN_THIS_PROCESS)


def test_an_empty_plan_changes_nothing(stock: tuple[Path, Served], tmp_path: Path) -> None:
    folder, expected = stock
    plan = Plan(fingerprint=random_plan(make_model("Llama")).fingerprint)
    export(folder, plan, tmp_path / "out")
    served = serve(tmp_path / "out", **IN_THIS_PROCESS)
    for found, wanted in zip(served.logprobs, expected.logprobs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert served.tokens == expected.tokens
    assert served.blocks == expected.blocks


@pytest.mark.parametrize("family", CASES)
def test_mixed_lengths_in_chunks(family: str, stock: tuple[Path, Served], tmp_path: Path) -> None:
    model = make_model(family)
    plan = random_plan(model, **CASES[family])
    expected = run_in_transformers(model, plan)
    export(save(model, tmp_path / "model"), plan, tmp_path / "out", strip=family == "Gemma3Text")
    served = serve(tmp_path / "out", **IN_THIS_PROCESS)
    assert_same(served, expected)
    if family == "Llama":
        _, dense = stock
        assert (served.logprobs[1] - dense.logprobs[1]).abs().max() > FAR
        linearized = len(CASES[family]["attention"])
        assert served.blocks == dense.blocks * LAYERS // (LAYERS - linearized)
