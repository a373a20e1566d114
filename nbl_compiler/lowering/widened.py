"""``nbl::widened``: a tensor as float32, in memory, in the order of its dimensions.

Inductor would convert or permute x again for every row that a streamed product multiplies it by;
and where x is not read one number after the other, it lays its loops across the rows of the weight
instead of along them. So x is written out once; that is a few rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("nbl::widened", mutates_args=())
def widened(x: Tensor) -> Tensor:
    """Return x as float32, contiguous, never x itself.

    Args:
        x: Of any floating dtype.
    """
    return x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


@widened.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


def register_widened() -> None:
    """Teach Inductor to keep the result in memory; further calls do nothing."""
    from torch._inductor.ir import Pointwise
    from torch._inductor.lowering import lowerings, register_lowering, to_dtype

    op = torch.ops.nbl.widened.default
    if op in lowerings:
        return

    def lower(x: Any) -> Any:
        wide = to_dtype(x, torch.float32)
        made = Pointwise.create(
            device=wide.get_device(),
            dtype=torch.float32,
            inner_fn=wide.make_loader(),
            ranges=wide.get_size(),
        )
        made.realize()
        return made

    register_lowering(op, type_promotion_kind=None)(lower)
