"""Blocks that look like attention and must be left alone.

Every look-alike is the plain block with one step changed, so whatever is refused is refused for
that step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from helpers.attention_blocks import BATCH, TOKENS, Attention, Form
from helpers.other_softmaxes import (
    Experts,
    ExpertsByEinsum,
    ExpertsByMatmul,
    Gate,
    Logits,
    Pooling,
    SoftLookUp,
)
from torch import Tensor, nn

Heads = tuple[Tensor, Tensor, Tensor]


# One step changed: where queries, keys and values come from.


class OtherKeysAndValues(Attention):
    def project(self, x: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        return self.q_proj(x), self.k_proj(other), self.v_proj(other)


class OtherKeys(Attention):
    def project(self, x: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        return self.q_proj(x), self.k_proj(other), self.v_proj(x)


class OtherValues(Attention):
    def project(self, x: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(other)


class ShiftedValues(Attention):
    """Values come from the token before, as in RWKV."""

    def project(self, x: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x.roll(1, 1))


class JoinedKeys(Attention):
    """Two streams attended to at once, as in multimodal diffusion transformers."""

    def project(self, x: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        both = torch.cat((self.k_proj(x), self.k_proj(other)), dim=1)
        return self.q_proj(x), both, torch.cat((self.v_proj(x), self.v_proj(other)), dim=1)

    def mask(self, x: Tensor, other: Tensor) -> Tensor | None:
        own = super().mask(x, other)
        return None if own is None else torch.cat((own, own), dim=1)


class CachedKeysAndValues(Attention):
    """Keys and values that were projected elsewhere, as cached encoder states are."""

    def project(self, x: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        keys = other[..., : self.sizes[1]]
        return self.q_proj(x), keys, keys


class LearnedQueries(Attention):
    """As many queries as tokens, from a weight (a resampler)."""

    def __init__(self, form: Form) -> None:
        super().__init__(form)
        self.latents = nn.Parameter(torch.empty(BATCH, TOKENS, self.sizes[0]))

    def project(self, x: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        return self.latents, self.k_proj(x), self.v_proj(x)


class BareQueries(Attention):
    def project(self, x: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        return x, self.k_proj(x), self.v_proj(x)


class BareKeys(Attention):
    def project(self, x: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        return self.q_proj(x), x, self.v_proj(x)


class BareValues(Attention):
    def project(self, x: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        return self.q_proj(x), self.k_proj(x), x


class NoProjections(Attention):
    def project(self, x: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        return x, x, x


class ChangedBetween(Attention):
    """The hidden state is written in place between its readers: two hidden states in one."""

    def project(self, x: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        q = self.q_proj(x)
        x.add_(other)
        return q, self.k_proj(x), self.v_proj(x)


class OtherBias(Attention):
    """The scores are shifted by a projection of a second hidden state (pair bias)."""

    def __init__(self, form: Form) -> None:
        super().__init__(form)
        self.pair_proj = nn.Linear(form.hidden, TOKENS)

    def mask(self, x: Tensor, other: Tensor) -> Tensor:
        return self.pair_proj(other)[:, None] if self.form.split else self.pair_proj(other)


class JoinedCrossAttention(Attention):
    """Attention to a second stream is added in front of the output projection (IP-Adapter)."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return super().mix(q, k, v, mask) + super().mix(q, self.others, self.others, None)

    def project(self, x: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        self.others = self.split(self.q_proj(other))
        return super().project(x, other)


# What leaves the region.


class ReturnsWeights(Attention):
    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        self.seen = self.weigh(q, k, mask)
        return torch.matmul(self.seen, v)

    def finish(self, mixed: Tensor, x: Tensor, heads: Heads) -> Any:
        return self.o_proj(mixed), self.seen


class ReturnsQueries(Attention):
    def finish(self, mixed: Tensor, x: Tensor, heads: Heads) -> Any:
        return self.o_proj(mixed), heads[0]


class ReturnsChangedQueries(Attention):
    """Queries are written in place, as caches are, and returned."""

    def project(self, x: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        self.seen = self.q_proj(x).mul_(2)
        return self.seen, self.k_proj(x), self.v_proj(x)

    def finish(self, mixed: Tensor, x: Tensor, heads: Heads) -> Any:
        return self.o_proj(mixed), self.seen


class ReturnsKeys(Attention):
    def finish(self, mixed: Tensor, x: Tensor, heads: Heads) -> Any:
        return self.o_proj(mixed), heads[1]


class ReturnsSumOfValues(Attention):
    def finish(self, mixed: Tensor, x: Tensor, heads: Heads) -> Any:
        return self.o_proj(mixed), heads[2].sum()


class ReturnsMixedValues(Attention):
    def finish(self, mixed: Tensor, x: Tensor, heads: Heads) -> Any:
        return self.o_proj(mixed), mixed


class AddsValues(Attention):
    """Values are added behind the output projection."""

    def finish(self, mixed: Tensor, x: Tensor, heads: Heads) -> Any:
        return self.o_proj(mixed) + self.merge(heads[2])


# The way to the output.


class NoOutputProjection(Attention):
    def finish(self, mixed: Tensor, x: Tensor, heads: Heads) -> Any:
        return mixed


class TwoOutputProjections(Attention):
    def __init__(self, form: Form) -> None:
        super().__init__(form)
        self.gate_proj = nn.Linear(self.sizes[0], form.hidden)

    def finish(self, mixed: Tensor, x: Tensor, heads: Heads) -> Any:
        return self.o_proj(mixed) * self.gate_proj(mixed).sigmoid()


class JoinedWithHidden(Attention):
    """The output projection reads the hidden state beside the mixed values."""

    def __init__(self, form: Form) -> None:
        super().__init__(form)
        self.o_proj = nn.Linear(self.sizes[0] + form.hidden, form.hidden)

    def finish(self, mixed: Tensor, x: Tensor, heads: Heads) -> Any:
        return self.o_proj(torch.cat((mixed, x), dim=-1))


class AddedToHidden(Attention):
    """The output projection reads mixed values to which the hidden state was added."""

    def finish(self, mixed: Tensor, x: Tensor, heads: Heads) -> Any:
        return self.o_proj(mixed + x)


# Dropout.


class DropsWeights(Attention):
    """Dropout in training mode: inside SDPA, or behind the softmax."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if not self.form.eager:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.3)
        return torch.matmul(F.dropout(self.weigh(q, k, mask), 0.3), v)


class DropsMixedValues(Attention):
    def finish(self, mixed: Tensor, x: Tensor, heads: Heads) -> Any:
        return self.o_proj(F.dropout(mixed, 0.3))


MISSING, OUTSIDE = "missing projection", "is used outside the region by"
CROSS, SECOND = "cross-attention: queries and keys", "more than one hidden input"
DROPOUT = "dropout is active"


@dataclass(frozen=True)
class LookAlike:
    """A look-alike and what is said about it.

    Args:
        kind: The module that stands where attention stands.
        reason: Part of the reason; None where there is nothing to reject.
        separate: Whether it needs a projection for each of queries, keys and values.
        square: Whether the heads must add up to the hidden size, one key head for each query head.
        eager: The spelling it needs, if it needs one.
        walks_on: Whether the hidden state itself is taken for a low-rank projection where a plain
            linear made it; then it is refused because the residual stream reads it too.
    """

    kind: type[nn.Module]
    reason: str | None
    separate: bool = True
    square: bool = False
    eager: bool | None = None
    walks_on: bool = False

    def fit(self, form: Form) -> Form:
        """Return the form, changed as far as the look-alike demands."""
        form = replace(form, fused=form.fused and not self.separate, halves=False)
        if self.square:
            form = replace(form, kv_heads=form.heads, hidden=form.heads * form.head_dim)
        return form if self.eager is None else replace(form, eager=self.eager)

    def reason_for(self, form: Form) -> str | None:
        """Return the part of the reason that this form is refused with."""
        return OUTSIDE if self.walks_on and form.before == "linear" else self.reason


LOOK_ALIKES = (
    LookAlike(OtherKeysAndValues, CROSS),
    LookAlike(OtherKeys, CROSS),
    LookAlike(OtherValues, SECOND),
    LookAlike(ShiftedValues, SECOND, walks_on=True),
    LookAlike(JoinedKeys, SECOND),
    LookAlike(JoinedCrossAttention, SECOND, square=True),
    LookAlike(CachedKeysAndValues, MISSING, square=True),
    LookAlike(LearnedQueries, MISSING),
    LookAlike(BareQueries, MISSING, square=True, walks_on=True),
    LookAlike(BareKeys, MISSING, square=True, walks_on=True),
    LookAlike(BareValues, MISSING, square=True, walks_on=True),
    LookAlike(NoProjections, MISSING, square=True, walks_on=True),
    LookAlike(ChangedBetween, SECOND),
    LookAlike(OtherBias, SECOND),
    LookAlike(ReturnsWeights, OUTSIDE, separate=False, eager=True),
    LookAlike(ReturnsQueries, OUTSIDE, separate=False),
    LookAlike(ReturnsChangedQueries, OUTSIDE),
    LookAlike(ReturnsKeys, OUTSIDE, separate=False),
    LookAlike(ReturnsSumOfValues, OUTSIDE, separate=False),
    LookAlike(AddsValues, OUTSIDE, square=True),
    LookAlike(ReturnsMixedValues, "returned before any output projection", separate=False),
    LookAlike(NoOutputProjection, "returned before any output projection", square=True),
    LookAlike(TwoOutputProjections, "enters several projections", separate=False),
    LookAlike(JoinedWithHidden, MISSING, walks_on=True),
    LookAlike(AddedToHidden, MISSING, square=True, walks_on=True),
    LookAlike(DropsWeights, DROPOUT, separate=False),
    LookAlike(DropsMixedValues, DROPOUT, separate=False),
    LookAlike(Gate, None),
    LookAlike(Experts, None),
    LookAlike(ExpertsByMatmul, None),
    LookAlike(ExpertsByEinsum, None),
    LookAlike(Pooling, None),
    LookAlike(SoftLookUp, None),
    LookAlike(Logits, None),
)
