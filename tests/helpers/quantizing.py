"""Tiny models quantized by torchao, and what they compute, by dequantized weights and surgery."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from helpers.ffn_surgery import LAYOUTS, fold_by_surgery
from helpers.tiny import texts, tiny
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import nbl_compiler as nbl
from nbl_compiler.int8_weights import quantize_rows
from nbl_compiler.plans import Plan, Site
from nbl_compiler.value_states import joined_weight, split_weight, states_of

CONFIG = Int8WeightOnlyConfig(set_inductor_config=False)
Filter = Callable[[nn.Module, str], bool]


def quantized(model: nn.Module, config: Any = CONFIG, which: Filter | None = None) -> nn.Module:
    """Return a copy of the model whose linear layers torchao quantized."""
    result = copy.deepcopy(model)
    quantize_(result, config, filter_fn=which)
    return result


def dequantized(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a copy of a quantized model with the plain weights that its own stand for."""
    result = copy.deepcopy(model)
    for module in result.modules():
        weight = getattr(module, "weight", None)
        if type(weight).__name__ == "Int8Tensor":
            module.weight = nn.Parameter(weight.dequantize(torch.float32), requires_grad=False)
    return result.to(dtype)


def held(plan: Plan) -> Plan:
    """Return the plan with every matrix as it is after quantization."""

    def rounded(matrix: Tensor) -> Tensor:
        return quantize_rows(matrix).dequantized()

    def of(site: Site) -> Site:
        tensors = dict(site.tensors)
        if site.decision == "rewritten" and site.kind == "attention":
            width = tensors["weight"].shape[1]
            tensors |= split_weight(rounded(joined_weight(tensors)), width, states_of(site.details))
        elif site.decision == "rewritten":
            tensors |= {name: rounded(tensors[name]) for name in ("weight", "down")}
        return replace(site, tensors=tensors)

    return replace(plan, sites=tuple(map(of, plan.sites)))


def attention_held(plan: Plan) -> Plan:
    """Return the plan with the maps of attention alone as they are after quantization."""
    others = tuple(site for site in plan.sites if site.kind == "ffn")
    attention = replace(plan, sites=tuple(s for s in plan.sites if s.kind == "attention"))
    return replace(plan, sites=(*held(attention).sites, *others))


@dataclass(frozen=True)
class Subject:
    """A tiny model, its plan, both quantized, and the oracle of that, in float32."""

    name: str
    model: nn.Module
    quantized: nn.Module
    plan: Plan
    oracle: nn.Module


@cache
def subject(name: str, dtype: torch.dtype = torch.float32, **attention: Any) -> Subject:
    """Calibrate a plan on float weights (first attention, second FFN), and quantize then."""
    model = tiny(name).to(dtype)
    config = nbl.Config(
        attention=nbl.Attention(layers=(0,), **attention), ffn=nbl.FFN(layers=(1,), keep=0.25)
    )
    plan = nbl.calibrate(model, texts(), config, progress=False)
    assert len(plan.rewritten) == 2
    nbl.attach(model, None)
    of_int8 = quantized(model)
    return Subject(name, model, of_int8, plan, oracle_of(name, of_int8, plan))


def oracle_of(
    name: str, model: nn.Module, plan: Plan, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Return what a quantized model computes with a plan, by weights that are not."""
    return fold_by_surgery(dequantized(model, dtype), held(plan), LAYOUTS[name])
