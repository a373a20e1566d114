"""Linear layers for a few tokens on a CPU.

At M = 1 … 4 rows a linear layer reads its weight and does little else; ATen's matrix product then
reaches a fraction of the memory's bandwidth. Written as multiply-and-sum, Inductor makes one
vectorised loop over the rows of the weight, in parallel, with what follows fused into it: 1.5 to
4 times faster at M = 1, and still faster at M = 4 (``benchmarks/ffn_microbench.py``).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

STREAM_TOKENS = 4
"""Most tokens that are streamed; beyond, a matrix product's reuse of each row wins."""


def streamed_product(x: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    """x rowsᵀ + bias in the dtype of x: [t, d] and [n, d] to [t, n]."""
    # [n, t, d]: a row of the matrix is read once and stays in cache for all tokens.
    value = (rows.to(x.dtype)[:, None] * x).sum(-1).t()
    return value if bias is None else value + bias.to(x.dtype)


def streamed_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` for a few tokens: [..., d] and [n, d] to [..., n]."""
    flat = x.reshape(-1, x.shape[-1])
    if flat.shape[0] > STREAM_TOKENS:
        return F.linear(x, weight, bias)
    return streamed_product(flat, weight, bias).reshape(*x.shape[:-1], weight.shape[0])
