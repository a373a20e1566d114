"""A contender as something that can be called: eager, by Inductor, or by this backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._dynamo import lookup_backend
from torch.fx import GraphModule

from bench.contenders import Contender, Made
from nbl_compiler import speed
from nbl_compiler.backend import nbl
from nbl_compiler.cost import graph_cost
from nbl_compiler.graph_report import GraphReport
from nbl_compiler.kv_cache import cache
from nbl_compiler.lowering.guarded_ffn_inductor import GATHER_TOKENS
from nbl_compiler.passes.private_copy import private_copy
from nbl_compiler.plans import Plan

# Guards are for decode: where speed is measured, more tokens at once run the dense FFN.
SERVED = {"guard_tokens": GATHER_TOKENS}


def for_quality(made: Made) -> Callable[..., Any]:
    """Return the model without lowering: quality does not depend on it."""
    if made.plan is None:
        return made.model
    options = {"plan": made.plan, "lowering": "eager"}
    return torch.compile(made.model, backend="nbl", options=options)


@dataclass
class Lowered:
    """A backend whose graphs run through Inductor, or without it: traced once for both.

    Args:
        plan: Of this package's backend; without one, graphs go to Inductor as they are.
        reports: Of every graph that was compiled.
        uncompiled: Whether graphs run without Inductor now.
    """

    plan: Plan | None
    reports: list[GraphReport] = field(default_factory=list)
    uncompiled: bool = False

    def __call__(self, graph_module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        kept = private_copy(graph_module)  # Inductor and Dynamo change theirs
        fast, plain = self._compiled(graph_module, inputs), None

        def run(*args: Any) -> Any:
            nonlocal plain
            if not self.uncompiled:
                return fast(*args)
            if plain is None:
                plain = self._plain(kept, args)
            return plain(*args)

        return run

    def _compiled(self, graph_module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        if self.plan is None:
            cost = graph_cost(graph_module)
            self.reports.append(GraphReport((), cost, cost))
            return lookup_backend("inductor")(graph_module, inputs)
        options = {"plan": self.plan, "report": self.reports.append, **SERVED}
        return nbl(graph_module, inputs, options=options)

    def _plain(self, graph_module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        if self.plan is None:
            return graph_module.forward
        options = {"plan": self.plan, "lowering": "eager", **SERVED}
        return nbl(graph_module, inputs, options=options)


def for_speed(contender: Contender, made: Made) -> tuple[speed.Contender, Lowered]:
    """Return the compiled model with its cache, and its backend; nothing is compiled yet."""
    backend = Lowered(made.plan)
    forward: Callable[..., Any] = made.model
    if contender.compiled:
        forward = torch.compile(made.model, backend=backend)
    return speed.Contender(contender.name, forward, made_cache(made), backend.reports), backend


def made_cache(made: Made) -> Callable[[int], Any]:
    """Return what builds the contender's static cache of a length."""
    from transformers import StaticCache

    if made.cache is not None:
        return made.cache
    if made.plan is not None:
        plan = made.plan
        return lambda length: cache(made.model, plan, length, "static")
    return lambda length: StaticCache(config=made.model.config, max_cache_len=length)
