"""Gates of all sites: one pass over some of the text, then a regression a site."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from tqdm.auto import tqdm

from nbl_compiler.models import hidden_size, text_config
from nbl_compiler.observe_gates import Samples
from nbl_compiler.several_processes import is_first_process, several_processes
from nbl_compiler.solvers.gates import fit_gates, joined
from nbl_compiler.value_states import Gates

GATE_TOKENS = 65_536
"""To fit gates on, of all processes together. Held-out error still falls from 16 k tokens on."""
GATE_BYTES = 4 << 30
"""Most that the hidden states of all layers may take for it, in bfloat16."""


def gate_tokens(model: Any) -> int:
    """Return how many tokens to fit a model's gates on: fewer for a wide and deep one."""
    layers = int(getattr(text_config(model), "num_hidden_layers", None) or 32)
    return min(GATE_TOKENS, GATE_BYTES // (2 * layers * hidden_size(model)))


def gates_of_sites(samples: Mapping[str, Samples], *, progress: bool) -> dict[str, Gates]:
    """Return site name → gates; in a job, of what all processes saw."""
    if not several_processes():
        return {
            site: fit_gates(*own)[0]
            for site, own in tqdm(samples.items(), "fitting gates", disable=not progress)
            if len(own[0].x)
        }
    names: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(names, list(samples))
    made: dict[str, Gates] = {}
    for site in dict.fromkeys(name for own in names for name in own):
        every: list[Samples | None] = [None] * dist.get_world_size()
        dist.all_gather_object(every, samples.get(site))
        result: list[Gates | None] = [None]
        if is_first_process():
            seen = [one for one in every if one is not None]
            train, held = (joined([one[side] for one in seen]) for side in (0, 1))
            result = [fit_gates(train, held)[0] if len(train.x) else None]
        dist.broadcast_object_list(result, src=0)
        if result[0] is not None:
            made[site] = result[0]
    return made
