"""A contender as something that can be called: eager, by Inductor, or by this backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._dynamo import lookup_backend
from torch.fx import GraphModule

from bench.contenders import Contender, Made
from nbl_compiler import speed
from nbl_compiler.cost import graph_cost
from nbl_compiler.graph_report import GraphReport
from nbl_compiler.kv_cache import cache
from nbl_compiler.lowering.guarded_ffn_inductor import GATHER_TOKENS

# Guards are for decode: where speed is measured, more tokens at once run the dense FFN.
SERVED = {"guard_tokens": GATHER_TOKENS}


def for_quality(made: Made, **options: Any) -> Callable[..., Any]:
    """Return the model without lowering: quality does not depend on it.

    Args:
        made: The contender.
        options: Further ones of the backend.
    """
    if made.plan is None:
        return made.model
    options = {"plan": made.plan, "lowering": "eager", **options}
    return torch.compile(made.model, backend="nbl", options=options)


def for_speed(contender: Contender, made: Made) -> speed.Contender:
    """Return the compiled model with its cache; nothing is compiled yet."""
    reports: list[GraphReport] = []
    if not contender.compiled:
        forward: Callable[..., Any] = made.model
    elif made.plan is None:
        forward = torch.compile(made.model, backend=_inductor(reports))
    else:
        options: dict[str, Any] = {"plan": made.plan, "report": reports.append, **SERVED}
        forward = torch.compile(made.model, backend="nbl", options=options)
    return speed.Contender(contender.name, forward, made_cache(made), reports)


def made_cache(made: Made) -> Callable[[int], Any]:
    """Return what builds the contender's static cache of a length."""
    from transformers import StaticCache

    if made.cache is not None:
        return made.cache
    if made.plan is not None:
        plan = made.plan
        return lambda length: cache(made.model, plan, length, "static")
    return lambda length: StaticCache(config=made.model.config, max_cache_len=length)


def _inductor(reports: list[GraphReport]) -> Callable[..., Any]:
    """Return Inductor as a backend that also counts what each graph does."""
    inductor = lookup_backend("inductor")

    def backend(graph_module: GraphModule, inputs: Sequence[Any]) -> Any:
        cost = graph_cost(graph_module)
        reports.append(GraphReport((), cost, cost))
        return inductor(graph_module, inputs)

    return backend
