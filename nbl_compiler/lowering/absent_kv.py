"""``nbl::absent_kv``: the keys or values of a layer whose cache stores none.

A cache made by ``nbl.cache`` has nothing to return for a linearized layer, yet the model's code
still asks for it while Dynamo traces. This op stands in: it has a shape, so tracing goes on, and
the cache pass drops it together with the region. If it ever *runs*, the model is not running the
plan that the cache was made for, and it raises instead of attending to nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nbl_compiler.errors import CacheMismatchError


@torch.library.custom_op("nbl::absent_kv", mutates_args=())
def absent_kv(states: Tensor, length: int) -> Tensor:
    """Stand for ``length`` cached states.

    Args:
        states: The new keys or values, [B, H, T, D].
        length: Number of cached positions that attention would see.

    Raises:
        CacheMismatchError: whenever it is executed.
    """
    raise CacheMismatchError(
        "a cache from nbl.cache holds nothing for a linearized layer, but this layer runs dense: "
        'compile the model with backend="nbl" and the same plan, or use an ordinary cache'
    )


@absent_kv.register_fake
def _(states: Tensor, length: int) -> Tensor:
    return states.new_empty((states.shape[0], states.shape[1], length, states.shape[3]))
