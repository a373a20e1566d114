"""``nbl::widened``: a half-precision tensor as float32, in memory.

Inductor would convert x again for every row that a streamed product multiplies it by. Worse, a
bfloat16 operand makes its loops 32 wide, and there ATen has no vectorised conversion of int8: the
product takes 2.5 times as long. So x is written out once; that is one row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("nbl::widened", mutates_args=())
def widened(x: Tensor) -> Tensor:
    """Return x as float32.

    Args:
        x: In bfloat16 or float16.
    """
    return x.float()


@widened.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.float32)


def register_widened() -> None:
    """Teach Inductor to keep the result in memory; further calls do nothing."""
    from torch._inductor.lowering import lowerings, register_lowering, to_dtype

    op = torch.ops.nbl.widened.default
    if op in lowerings:
        return

    def lower(x: Any) -> Any:
        made = to_dtype(x, torch.float32)
        made.realize()
        return made

    register_lowering(op, type_promotion_kind=None)(lower)
