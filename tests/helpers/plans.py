"""Plans with random maps: they prove the rewrite, not the calibration."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import nn

from nbl_compiler.fingerprint import sketch
from nbl_compiler.plans import Plan, Site
from nbl_compiler.value_states import BUCKETS, NO_STATES, States


def random_plan(
    model: nn.Module,
    sites: Sequence[str],
    linearized: Collection[int],
    width: int,
    input: str = "normed",
    seed: int = 3,
    states: States = NO_STATES,
    value_width: int = 0,
    heads: int = 0,
) -> Plan:
    """Return a plan that replaces some of the sites by seeded random maps.

    Args:
        model: The model that the plan is for.
        sites: Names of all its sites, in model order.
        linearized: Indices into ``sites``.
        width: Size d of the hidden state.
        input: ``"normed"`` or ``"residual"``.
        seed: Of the maps' entries.
        states: Value states that the maps read.
        value_width: Width of the values of all heads; of all query heads, if they are mixed.
        heads: Number of query heads.
    """
    generator = torch.Generator().manual_seed(seed)
    sketches = list(dict.fromkeys(sketch(p) for p in model.parameters()))

    def site(index: int, name: str) -> Site:
        if index not in linearized:
            return Site(name, "attention", "kept", "left dense by the test")
        maps = {
            "weight": torch.randn(width, width, generator=generator) / width**0.5,
            "bias": torch.randn(width, generator=generator),
        }
        weights = [sketches.index(sketch(p)) for p in model.get_submodule(name).parameters()]
        details = {"input": input, "weights": weights}
        if states.mixed:
            several = torch.randn(width, value_width, generator=generator)
            maps["mix"] = several * 2 / value_width**0.5
            shape = (heads, 1 + len(BUCKETS))
            maps["gates"] = 2 * torch.randn(*shape, width, generator=generator) / width**0.5
            maps["gate_offsets"] = torch.randn(*shape, generator=generator)
            details["mixed"] = True
        elif states:
            # Twice the size of the rest: a mistake in the states shall show.
            several = torch.randn(states.vectors, width, value_width, generator=generator)
            several *= 2 / value_width**0.5
            parts = {"taps": several[: states.taps], "averages": several[states.taps :]}
            maps |= {name: part for name, part in parts.items() if part.numel()}
            details |= {"taps": states.taps, "averages": states.averages}
        return Site(
            name, "attention", "rewritten", "asked for by the test", tensors=maps, details=details
        )

    return Plan(
        tuple(site(i, name) for i, name in enumerate(sites)),
        tuple(sketches),
        type(model).__name__,
    )
