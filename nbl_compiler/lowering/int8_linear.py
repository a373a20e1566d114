"""Linear layers whose matrix is held as int8, one scale a row.

    y = scale ⊙ (x codesᵀ) + b        x [..., d], codes [n, d] int8, scale [n] float32, b [n]

The scale comes behind the sum, so no row has to be multiplied by it. For a few tokens Inductor
makes one loop of it that reads the codes, converts them in registers and sums in float32
(``streamed_codes.py``): the matrix never exists in a wider type. For more, it is converted once a
call for a matrix product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nbl_compiler.lowering.streamed_codes import int8_sums

_STREAM_TOKENS = {torch.float32: 16, torch.bfloat16: 8, torch.float16: 8}


def int8_stream_tokens(dtype: torch.dtype) -> int:
    """Return the most tokens that are streamed, for x of this dtype; 0 if none are.

    The loop costs the same for each token. The other way costs a conversion of the whole matrix,
    which is worth about so many.
    """
    return _STREAM_TOKENS.get(dtype, 0)


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
    if not 0 < flat.shape[0] <= int8_stream_tokens(x.dtype):
        return int8_linear(x, codes, scale, bias)
    made = int8_sums(flat, codes) * scale
    made = made if bias is None else made + bias
    return made.to(x.dtype).reshape(*x.shape[:-1], codes.shape[0])
