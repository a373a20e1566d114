"""Fitting a guarded FFN to the tokens that its guard leaves folded.

TARDIS (arXiv 2501.10054) fits each activation on its hot range only: the rest is corrected anyway.
The same for a guard that picks neurons by score: which tokens a neuron serves folded depends on the
fit, so fit and guard are refined in turns, each of which streams over the tokens with nine sums per
neuron. At last C and B are fitted to what the corrections leave of the dense output, shrunk towards
the fold of the slopes; a plain fold stays where a certificate needs it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from nbl_compiler.lowering.guarded_site import GuardedFFN

TURNS = 3
"""Turns of fitting and choosing."""

MIN_TOKENS = 16
"""A neuron that fewer tokens leave folded keeps its slopes: they hardly matter then."""

RELATIVE_RIDGE = 1e-6
"""Added to the variances of g and u: where they are collinear, the slopes are not determined."""


class Slopes(NamedTuple):
    """ĥ = up·u + gate·g + intercept, per neuron, [f] float64; ``gate`` is None for a plain FFN."""

    gate: Tensor | None
    up: Tensor
    intercept: Tensor


class SlopeMoments:
    """First and second moments of (g, u, h) per neuron, over the tokens that leave it folded.

    A commutative monoid: moments of parts of a stream can be merged in any order.

    Args:
        neurons: f.
        gated: Whether there is a g.
    """

    def __init__(self, neurons: int, gated: bool, device: torch.device | str = "cpu") -> None:
        variables = 3 if gated else 2
        self.gated = gated
        self.count = torch.zeros(neurons, dtype=torch.float64, device=device)
        self.sums = torch.zeros(variables, neurons, dtype=torch.float64, device=device)
        self.products = torch.zeros(
            variables, variables, neurons, dtype=torch.float64, device=device
        )

    def observe(self, gate: Tensor | None, up: Tensor, hidden: Tensor, folded: Tensor) -> None:
        """Add tokens: all [tokens, f]; ``folded`` (bool) marks the neurons that stay folded."""
        known = (up, hidden) if gate is None else (gate, up, hidden)
        variables = [v.double() for v in known]
        weight = folded.double()
        self.count += weight.sum(0)
        for row, first in enumerate(variables):
            weighted = weight * first
            self.sums[row] += weighted.sum(0)
            for column in range(row + 1):
                product = (weighted * variables[column]).sum(0)
                self.products[row, column] += product
                if column != row:
                    self.products[column, row] += product

    def merge(self, other: SlopeMoments) -> SlopeMoments:
        """The moments of both streams together; neither operand changes."""
        merged = SlopeMoments(self.count.numel(), self.gated, self.count.device)
        merged.count = self.count + other.count
        merged.sums = self.sums + other.sums
        merged.products = self.products + other.products
        return merged

    def slopes(self, fallback: Slopes | None = None) -> Slopes:
        """The affine fit of least mean squared error of h in (g, u).

        Neurons with fewer than :data:`MIN_TOKENS` tokens take those of ``fallback`` (zero without).
        """
        count = self.count.clamp_min(1.0)
        mean = self.sums / count
        covariance = self.products / count - mean[:, None] * mean[None, :]
        inputs = covariance.shape[0] - 1
        matrix = covariance[:inputs, :inputs].permute(2, 0, 1)
        diagonal = matrix.diagonal(dim1=1, dim2=2)
        ridge = diagonal.clamp_min(0) * RELATIVE_RIDGE + torch.finfo(torch.float64).tiny
        right = covariance[:inputs, inputs].T
        found = torch.linalg.solve(matrix + torch.diag_embed(ridge), right).T
        intercept = mean[inputs] - (found * mean[:inputs]).sum(0)
        enough = self.count >= MIN_TOKENS
        former = fallback or Slopes(None, torch.zeros_like(count), torch.zeros_like(count))
        former_gate = torch.zeros_like(count) if former.gate is None else former.gate
        gate = torch.where(enough, found[0], former_gate) if self.gated else None
        up = torch.where(enough, found[-1], former.up)
        return Slopes(gate, up, torch.where(enough, intercept, former.intercept))


def fold_slopes(site: GuardedFFN) -> tuple[Tensor, Tensor]:
    """C = W2 (diag(a) W_up + diag(b) W_gate) and B, in float64: [d_out, d] and [d_out]."""
    down = site.down.double().T
    slope, hidden_bias = site.up_slope.double(), site.intercept.double()
    hidden = slope[:, None] * site.up.double()
    if site.up_bias is not None:
        hidden_bias = hidden_bias + slope * site.up_bias.double()
    if site.gate is not None and site.gate_slope is not None:
        hidden = hidden + site.gate_slope.double()[:, None] * site.gate.double()
        if site.gate_bias is not None:
            hidden_bias = hidden_bias + site.gate_slope.double() * site.gate_bias.double()
    bias = down @ hidden_bias
    return down @ hidden, bias if site.down_bias is None else bias + site.down_bias.double()


def with_slopes(site: GuardedFFN, slopes: Slopes) -> GuardedFFN:
    """The site with other slopes, folded anew."""
    like = site.up_slope
    gate = None if slopes.gate is None else slopes.gate.to(like)
    changed = replace(
        site, gate_slope=gate, up_slope=slopes.up.to(like), intercept=slopes.intercept.to(like)
    )
    matrix, bias = fold_slopes(changed)
    return replace(changed, folded=matrix.to(site.folded), folded_bias=bias.to(site.folded_bias))
