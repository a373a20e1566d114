"""What ``nbl bench``, the demo and the benchmark have in common."""

from __future__ import annotations

import torch
from helpers.plans import random_plan
from models.architectures import BY_NAME, HIDDEN, SLIDING_WINDOW, make

from nbl_compiler import speed

CONTEXT = 2 * SLIDING_WINDOW + 4


def test_a_step_behind_sliding_windows_is_compiled_once() -> None:
    """Its length is a number of Python, which Dynamo by itself takes for a constant at first."""
    model = make("gemma3", "sdpa", layers=4)
    plan = random_plan(model, BY_NAME["gemma3"].site_names(4), [1], HIDDEN)
    _, contender = speed.contenders(model, plan, lowering="eager")
    kv = contender.make_cache(CONTEXT + 10)
    token = torch.ones(1, 1, dtype=torch.long)
    call = speed.decode_call(contender, kv, token, CONTEXT, steps=4)
    with speed.measuring():
        contender.first_calls(call)
    assert len(contender.reports) == 1
    assert contender.compile_seconds > 0
