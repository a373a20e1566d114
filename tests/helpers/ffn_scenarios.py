"""Tiny models with calibrated plans for their FFNs, and the same plans applied by surgery."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from helpers.ffn_surgery import LAYOUTS, FoldedFFN, fold_by_surgery, folded_parts
from helpers.generating import CACHE_LENGTH, generate, logits_of, prompt
from helpers.recording import rewritten_graphs
from helpers.scenarios import compile_with, full_inputs, main_output
from helpers.tiny import texts, tiny
from models.architectures import BY_NAME
from models.ffn_counts import EXPECTED
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import Cache, DynamicCache, StaticCache

import nbl_compiler as nbl

STEPS = 8

FORMS: dict[str, dict[str, Any]] = {
    "folded": {"keep": 0},
    "kept": {"keep": 0.25},
    "whole": {"keep": 1.0},
    "predicted": {"keep": 0.25, "guard": "predicted", "capacity": 0.3},
    "predicted, low rank": {
        "keep": 0,
        "guard": "predicted",
        "capacity": 0.2,
        "predictor": "low_rank",
        "rank": 8,
    },
    "predicted values": {
        "keep": 0,
        "guard": "predicted",
        "capacity": 0.4,
        "predictor": "quantized_8",
        "values": "predicted",
    },
    "exact": {"keep": 0.25, "guard": "exact", "capacity": 0.2},
    # With room for all, the count of flagged neurons (which rounding moves) decides nothing.
    "exact, 8 bits": {"keep": 0, "guard": "exact", "capacity": 1.0, "predictor": "quantized_8"},
}


@dataclass(frozen=True)
class Subject:
    """A tiny model, a plan that folds all its FFNs, and the plan applied by surgery."""

    name: str
    model: nn.Module
    plan: nbl.Plan
    oracle: nn.Module

    @property
    def parts(self) -> list[FoldedFFN]:
        """The oracle's FFNs."""
        return folded_parts(self.oracle)


@dataclass(frozen=True)
class Run:
    """One use of a compiled subject: its graphs, and the logits of it, the oracle and the model."""

    subject: Subject
    graphs: tuple[GraphModule, ...]
    logits: Tensor
    expected: Tensor
    dense: Tensor


@cache
def subject(name: str, form: str, layers: int = 1, attention: bool = False) -> Subject:
    """Calibrate a family's tiny model on random text; all its FFNs are folded.

    With ``attention``, the first layer's attention is linear as well.
    """
    model = tiny(name, layers=layers)
    linear = nbl.Attention(layers=(0,)) if attention else None
    config = nbl.Config(attention=linear, ffn=nbl.FFN(max_nmse=1e9, **FORMS[form]))
    plan = nbl.calibrate(model, texts(), config, progress=False)
    nbl.attach(model, None)
    folded = [site.name for site in plan.rewritten if site.kind == "ffn"]
    assert folded == [name for name in EXPECTED[name].sites if model_has(model, name)]
    return Subject(name, model, plan, fold_by_surgery(model, plan, LAYOUTS[name]))


def model_has(model: nn.Module, path: str) -> bool:
    """Tell whether the model is deep enough to have this module."""
    return path in dict(model.named_modules())


@cache
def full_run(name: str, form: str, lowering: str = "eager", **of_subject: Any) -> Run:
    """Run a batch without a cache; an encoder's has padding."""
    one = subject(name, form, **of_subject)
    given = full_inputs(name, batch=3, length=9)
    if BY_NAME[name].kind == "encoder":
        mask = given["attention_mask"] = torch.ones_like(given["input_ids"])
        mask[1, -3:] = mask[2, -5:] = 0
    options = {"plan": one.plan, "lowering": lowering}
    compiled = torch.compile(one.model, backend="nbl", options=options)
    with rewritten_graphs() as graphs, torch.no_grad():
        logits = main_output(compiled(**given))
        expected, dense = main_output(one.oracle(**given)), main_output(one.model(**given))
    return Run(one, tuple(graphs), logits, expected, dense)


@cache
def generation(
    name: str, form: str, cache_kind: str, padded: bool = True, **of_subject: Any
) -> Run:
    """Generate greedily with a cache; the oracle reads the whole result at once without one."""
    one = subject(name, form, **of_subject)
    given = prompt(name, padded)
    model = one.model
    with rewritten_graphs() as graphs, torch.no_grad():
        model.forward = compile_with(model.forward, one.plan)
        try:
            past = new_cache(model, cache_kind)
            result = generate(model, given, STEPS, past_key_values=past)
        finally:
            del model.forward
        expected = logits_of(one.oracle, result.sequences, given, STEPS)
        dense = logits_of(model, result.sequences, given, STEPS)
    return Run(one, tuple(graphs), torch.stack(result.logits, dim=1), expected, dense)


def new_cache(model: nn.Module, kind: str) -> Cache:
    """Return a fresh cache of transformers' own."""
    if kind == "StaticCache":
        return StaticCache(config=model.config, max_cache_len=CACHE_LENGTH)
    return DynamicCache(config=model.config)
