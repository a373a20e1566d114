"""Linear layers for a few tokens on a CPU.

At M = 1 … 8 rows a linear layer reads its weight and does little else; ATen's matrix product then
reaches a fraction of the memory's bandwidth on some CPUs. Written as multiply-and-sum, Inductor
makes one vectorised loop over the rows of the weight, in parallel, with what follows fused into it.
(Not on all: see the demo on a second machine in ``docs/measurements.md``.)

Each token is a sum of its own, not one more dimension of a sum: only then does Inductor load a row
of the weight once for all of them, keep their sums in registers, and write y with a token's numbers
side by side, as the next layer reads them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nbl_compiler.lowering.widened import widened

_STREAM_TOKENS = {torch.float32: 8, torch.bfloat16: 4, torch.float16: 4}
LONGEST_SUM = 4096
"""Inductor sums more numbers than this by a cascade, at half the speed."""


def stream_tokens(dtype: torch.dtype) -> int:
    """Return the most tokens that are streamed, for x of this dtype; 0 if none are.

    Beyond, a matrix product's reuse of each row wins.
    """
    return _STREAM_TOKENS.get(dtype, 0)


def token_sums(x: Tensor, sum_of: Callable[[Tensor], Tensor]) -> Tensor:
    """Return one fused loop's worth of sums, float32.

    Args:
        x: [t, …], a token each; in memory, since it is read for every row of the weight.
        sum_of: What is summed for one token […]: [n].

    Returns:
        [t, n].
    """
    return torch.stack([sum_of(token) for token in x.unbind(0)])


def streamed_product(x: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    """x rowsᵀ + bias in the dtype of x: [t, d] and [n, d] to [t, n]."""
    parts = _parts(rows.shape[1])

    def sum_of(token: Tensor) -> Tensor:
        pairs = zip(rows.chunk(parts, 1), token.chunk(parts), strict=True)
        first, *others = [(row.float() * some).sum(-1) for row, some in pairs]
        return sum(others, first)

    alone = x.shape[0] == 1 and x.dtype == torch.float32  # then it is in memory, or nearly free
    value = token_sums(x if alone else widened(x), sum_of)
    value = value if bias is None else value + bias
    return value.to(x.dtype)


def streamed_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` for a few tokens: [..., d] and [n, d] to [..., n]."""
    flat = x.reshape(-1, x.shape[-1])
    if not 0 < flat.shape[0] <= stream_tokens(x.dtype):
        return F.linear(x, weight, bias)
    return streamed_product(flat, weight, bias).reshape(*x.shape[:-1], weight.shape[0])


def _parts(width: int) -> int:
    """Return into how many equal parts a row of the weight is cut, 1 if it cannot be."""
    least = -(-width // LONGEST_SUM)
    return next((n for n in range(least, 4 * least) if width % n == 0), 1)
