"""Compiled folded FFNs against the same plan applied by module surgery: equal within rounding."""

from __future__ import annotations

import pytest
import torch
from helpers.ffn_scenarios import STEPS, Run, full_run, generation
from helpers.generating import PADDING
from torch.fx import GraphModule

from nbl_compiler.passes.ffn_sites import load_folded
from nbl_compiler.passes.sites import load_linearized

# Relative to the deviation of the logits; the oracle sums in float64. Measured: at most 4e-6.
ROUNDING = 3e-5
# What folding does to the logits, on the same scale: a mistake would show. Measured: 0.12 to 3.4.
MATTERS = 0.05

# Every form on gated and on plain FFNs (exact guards: plain ones only), every family in several.
FORMS_OF = {
    "llama": ("folded", "kept", "whole", "predicted"),
    "gemma3": ("kept", "whole", "predicted, low rank"),
    "phi3": ("folded", "kept", "predicted", "predicted values"),
    "gpt2": ("folded", "kept", "exact"),
    "gpt_neox": ("kept", "predicted", "exact, 8 bits"),
    "opt": ("kept", "whole", "predicted, low rank", "exact"),
    "bert": ("folded", "kept", "predicted", "predicted values", "exact"),
}
# Every family, and every form; decoding has more.
EVERYDAY = {
    ("llama", "folded"),
    ("llama", "predicted"),
    ("gemma3", "kept"),
    ("gemma3", "predicted, low rank"),
    ("phi3", "kept"),
    ("phi3", "predicted values"),
    ("gpt2", "exact"),
    ("gpt_neox", "exact, 8 bits"),
    ("gpt_neox", "predicted"),
    ("opt", "whole"),
    ("opt", "exact"),
    ("bert", "kept"),
    ("bert", "predicted"),
}
DECODED = (
    ("llama", "kept", "DynamicCache"),
    ("llama", "kept", "StaticCache"),
    ("llama", "predicted", "DynamicCache"),
    ("gemma3", "kept", "StaticCache"),
    ("phi3", "folded", "DynamicCache"),
    ("gpt2", "exact", "DynamicCache"),
    ("gpt2", "exact", "StaticCache"),
    ("gpt_neox", "exact, 8 bits", "StaticCache"),
    ("opt", "predicted, low rank", "StaticCache"),
    ("phi3", "predicted values", "DynamicCache"),
)


def folded(graph: GraphModule) -> set[str]:
    return {match.site for match in (*load_folded(graph), *load_linearized(graph))}


def assert_equal_within_rounding(run: Run, form: str) -> None:
    """Check a run against the oracle, and that the oracle could have told a mistake."""
    planned = {site.name for site in run.subject.plan.rewritten}
    assert run.graphs
    assert all(folded(graph) == planned for graph in run.graphs)
    scale = run.expected.double().std().item()
    torch.testing.assert_close(run.logits, run.expected, atol=ROUNDING * scale, rtol=0)
    changed = (run.dense - run.expected).abs().max().item()
    if form == "whole":
        assert changed < ROUNDING * scale
    else:
        assert changed > MATTERS * scale


@pytest.mark.parametrize(
    ("name", "form"),
    [
        pytest.param(name, form, marks=() if (name, form) in EVERYDAY else pytest.mark.thorough)
        for name, forms in FORMS_OF.items()
        for form in forms
    ],
)
def test_one_pass(name: str, form: str) -> None:
    assert_equal_within_rounding(full_run(name, form), form)


@pytest.mark.parametrize(("name", "form", "cache"), DECODED)
def test_greedy_decoding_of_padded_prompts(name: str, form: str, cache: str) -> None:
    """Three rows with left padding, a prefill and eight steps."""
    run = generation(name, form, cache)
    assert run.logits.shape[:2] == (len(PADDING), STEPS + 1)
    assert_equal_within_rounding(run, form)


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_attention_and_ffn_in_one_plan(name: str) -> None:
    """Both read one norm in GPT-NeoX, whose two branches are parallel."""
    for run in (
        generation(name, "kept", "StaticCache", layers=2, attention=True),
        generation(name, "kept", "DynamicCache", layers=2, attention=True),
    ):
        kinds = [site.kind for site in run.subject.plan.rewritten]
        assert kinds == ["attention", "ffn", "ffn"]
        assert_equal_within_rounding(run, "kept")


@pytest.mark.parametrize(("name", "form"), [("llama", "kept"), ("gpt2", "exact")])
def test_inductor(name: str, form: str) -> None:
    assert_equal_within_rounding(full_run(name, form, lowering="inductor"), form)
