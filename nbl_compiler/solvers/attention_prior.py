"""A prior for attention maps: the model's own weights, mixed in fixed proportions.

Attention gives y_t = Σ_h O_h Σ_j a_thj v_{t−j}. If the weights a_thj did not depend on the token, a
map of x and the value states would be

    W = Σ_h c_h0 O_h V_h        U_s = Σ_h c_hs O_h  on the values of h's key/value head

with one number c a head and state: so few numbers that a few hundred tokens determine them. A
ridge towards this map, in place of zero, is worth most where text is short.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nbl_compiler.solvers.moments import Moments

# Relative to each diagonal entry of the normal equations: heads that do the same share evenly.
RIDGE = 1e-4


def attention_prior(moments: Moments, value: Tensor, output: Tensor) -> Tensor:
    """Return the map [d_out, p] of least error among those of the form above.

    Args:
        moments: Of x [d], with the states of all key/value heads behind it, and y.
        value: V, [G, D, d]: G key/value heads of size D.
        output: O, [d_out, H, D]: H heads; head h reads key/value head h // (H / G).
    """
    groups, size = value.shape[:2]
    heads = output.shape[1]
    own = moments.centred()
    device = own.xx.device
    value, output = value.to(device, torch.float64), output.to(device, torch.float64)
    count = max(own.count, 1)
    sources = _sources(value, own.xx.shape[0])  # [S, G, D, p]
    states = sources.shape[0]
    flat = sources.flatten(0, 2)
    among = (flat @ (own.xx / count) @ flat.T).unflatten(0, (states, groups, size))
    among = among.unflatten(3, (states, groups, size))
    crossed = (own.yx / count @ flat.T).unflatten(1, (states, groups, size))
    of_head = torch.arange(heads, device=device) // (heads // groups)
    rows = []
    for head in range(heads):  # all at once would be (states · heads · size)² numbers
        shared = torch.einsum("od,oke->dke", output[:, head], output)
        pairs = among[:, of_head[head]][:, :, :, of_head]  # [S, D, S, H, D]
        rows.append(torch.einsum("sdtke,dke->skt", pairs, shared).flatten(1))
    gram = torch.cat(rows)
    right = torch.einsum("oshd,ohd->hs", crossed[:, :, of_head], output).flatten()
    gram = gram + torch.diag(RIDGE * gram.diagonal())
    known = gram.diagonal() > 0
    shares = torch.zeros_like(right)
    shares[known] = torch.linalg.solve(gram[known][:, known], right[known])
    weighted = torch.einsum("hs,ohd->sohd", shares.view(heads, states), output)
    by_group = weighted.unflatten(2, (groups, -1)).sum(3)  # [S, d_out, G, D]
    return torch.einsum("sogd,sgdp->op", by_group, sources)


def _sources(value: Tensor, inputs: int) -> Tensor:
    """Return what reads v and each state off the regressors, [1 + states, G, D, p]."""
    groups, size, width = value.shape
    states = (inputs - width) // (groups * size)
    sources = value.new_zeros(1 + states, groups, size, inputs)
    sources[0, :, :, :width] = value
    units = torch.eye(groups * size, dtype=value.dtype, device=value.device)
    for state in range(states):
        start = width + state * groups * size
        sources[1 + state].flatten(0, 1)[:, start : start + groups * size] = units
    return sources
