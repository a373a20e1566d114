"""Linear layers whose matrix is held as int8, one scale a row.

    y = scale ⊙ (x codesᵀ) + b        x [..., d], codes [n, d] int8, scale [n] float32, b [n]

The scale comes behind the sum, so no row has to be multiplied by it. For a few tokens Inductor makes
one loop of it that reads the codes, converts them in registers and sums in float32: the matrix
never exists in a wider type. For more, it is converted once a call for an ordinary matrix product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

INT8_STREAM_TOKENS = 16
"""Most tokens that are streamed: the loop costs the same for each token, the conversion of the
whole matrix costs as much as about sixteen."""


def int8_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """The meaning of the layer, by a matrix product: [..., d] and [n, d] to [..., n]."""
    if x.dtype == torch.float16:  # whose range a sum of x times codes of 127 would leave
        return F.linear(x, (codes.float() * scale[:, None]).to(x.dtype), bias)
    made = F.linear(x, codes.to(x.dtype)) * scale
    return (made if bias is None else made + bias).to(x.dtype)


def streamed_int8_linear(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The same for a few tokens, as multiply-and-sum in float32."""
    flat = x.reshape(-1, x.shape[-1])
    if flat.shape[0] > INT8_STREAM_TOKENS:
        return int8_linear(x, codes, scale, bias)
    # [n, t, d]: a row of codes is read once and stays in cache for all tokens.
    made = (codes.float()[:, None] * flat.float()).sum(-1).t() * scale
    made = made if bias is None else made + bias
    return made.to(x.dtype).reshape(*x.shape[:-1], codes.shape[0])
