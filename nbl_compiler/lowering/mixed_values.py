"""Mixed values in plain torch: attention whose weights depend on distances and on who asks.

A token's earlier positions fall into buckets by their distance, and x_t alone says how much weight
each bucket gets, for every query head h::

    p_h(b | x_t) = softmax over b of (g_hb · x_t + o_hb + log n_b)         n_b positions in bucket b
    c_t = [Σ_b p_h(b | x_t) v̄_b,h]_h                                     v̄_b their mean value

The oldest position in reach is in no bucket: models let heads that have nothing to say attend to
it, and its value says little. In its place there is a bucket of value 0.

As with the other value states (``value_states.py``), all follows from n_t, how many positions a
token may attend to. Among rows of values a bucket is a difference of two running sums; a layer of
``nbl.cache`` carries the sum of all of them on, and keeps as many rows as the near buckets reach.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nbl_compiler.lowering.value_states import joined_rows, last_positions
from nbl_compiler.value_states import BUCKETS


def mixed_values(
    rows: Tensor, positions: Tensor, count: Tensor, x: Tensor, gates: Tensor, offsets: Tensor
) -> Tensor:
    """Return c_t from rows of values.

    Args:
        rows: All values in reach, [B, H, R, D].
        positions: Where the tokens of this call are among them, [T], consecutive.
        count: n_t, [B or 1, T].
        x: The hidden state that attention's own projections read, [..., d], B · T rows.
        gates: g, [heads, 1 + buckets, d]; the first is that of the bucket of value 0.
        offsets: o, [heads, 1 + buckets].

    Returns:
        [B, T, heads · D], in the dtype of the rows.
    """
    batch, length = rows.shape[0], positions.shape[0]
    weights = bucket_weights(x.reshape(batch, length, -1), count, gates, offsets)
    if count.shape[1] == 1:
        return _of_one(rows, positions, count, weights)
    running = F.pad(rows.double().cumsum(2), (0, 0, 1, 0))
    means = [
        (_taken(running, positions - first + 1) - _taken(running, positions - last)).float()
        / _shaped(size.clamp(min=1))
        for first, last, size in _buckets(count)
    ]
    return _mixed(weights, means).to(rows.dtype)


def carried_mix(
    values: Tensor,
    count: Tensor,
    past: Tensor,
    total: Tensor,
    x: Tensor,
    gates: Tensor,
    offsets: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the same from a running sum in place of all rows; n_t has no window here.

    Args:
        values: Values of this call, [B, H, T, D].
        count: n_t, [B or 1, T].
        past: The values in front of them, [B, H, r, D], r = ``value_states.MIX_REACH``.
        total: Σ v of all positions in reach of the last call's last token but the oldest,
            [B, H, 1, D], float32.
        x: As for ``mixed_values``, as are ``gates`` and ``offsets``.
        gates: See there.
        offsets: See there.

    Returns:
        c_t [B, T, heads · D]; and the sum after this call.
    """
    batch, length = values.shape[0], values.shape[2]
    weights = bucket_weights(x.reshape(batch, length, -1), count, gates, offsets)
    rows = joined_rows(past, values)
    positions = last_positions(rows, values)
    if count.shape[1] == 1:
        sums = torch.where(_shaped(count > 1), values.float() + total, 0.0)
        return _carried_of_one(rows, positions, count, weights, sums).to(values.dtype), sums
    running = F.pad(rows.double().cumsum(2), (0, 0, 1, 0))
    own = last_positions(values, values)
    # Tokens whose document began in an earlier call carry on what was summed up there.
    carries = count > own + 1
    here = torch.where(carries, own + 1, count - 1).clamp(min=0)
    end = _taken(running, positions.unsqueeze(0) + 1)
    since = end - _taken(running, positions + 1 - here)
    sums = since.float() + torch.where(_shaped(carries), total, 0.0)
    *near, (*_, size) = _buckets(count)
    parts = [
        (_taken(running, positions - lo + 1) - _taken(running, positions - hi)).float()
        for lo, hi, _ in near
    ]
    parts.append(sums - sum(parts[1:], parts[0]))
    sizes = [*(n for *_, n in near), size]
    means = [
        torch.where(_shaped(n > 0), part, 0.0) / _shaped(n.clamp(min=1))
        for part, n in zip(parts, sizes, strict=True)
    ]
    return _mixed(weights, means).to(values.dtype), sums[:, :, -1:]


def bucket_weights(x: Tensor, count: Tensor, gates: Tensor, offsets: Tensor) -> Tensor:
    """Return p, [B, T, heads, 1 + buckets].

    Args:
        x: [B, T, d].
        count: n_t, [B or 1, T].
        gates: [heads, 1 + buckets, d].
        offsets: [heads, 1 + buckets].
    """
    scores = F.linear(x, gates.flatten(0, 1)).float() + offsets.flatten().float()
    sizes = bucket_sizes(count).unsqueeze(2)
    weights: Tensor = (scores.unflatten(-1, tuple(offsets.shape)) + sizes.log()).softmax(-1)
    return weights


def bucket_sizes(count: Tensor) -> Tensor:
    """Return how many positions each bucket has, [B or 1, T, 1 + buckets], float32.

    The bucket of value 0 counts as one position.
    """
    sizes = [size for *_, size in _buckets(count)]
    return torch.stack([torch.ones_like(count), *sizes], -1).float()


def bucket_masses(probabilities: Tensor, count: Tensor) -> Tensor:
    """Return how much weight attention gives to each bucket, [B, T, heads, 1 + buckets].

    Args:
        probabilities: Of attention, [B, heads, T, K]; the last T columns are the tokens themselves.
        count: n_t, [B or 1, T].
    """
    batch, heads, length, columns = probabilities.shape
    running = F.pad(probabilities.float().cumsum(-1), (1, 0))
    own = torch.arange(columns - length, columns, device=count.device)

    def taken(index: Tensor) -> Tensor:
        index = index.clamp(0, columns).expand(batch, length)
        return running.gather(-1, index[:, None, :, None].expand(batch, heads, -1, 1))[..., 0]

    found = [
        taken(own - first + 1) - taken(torch.minimum(own - last, own - first + 1))
        for first, last, _ in _buckets(count)
    ]
    rest = 1 - sum(found[1:], found[0])
    return torch.stack([rest, *found], -1).clamp(min=0).transpose(1, 2)


def _buckets(count: Tensor) -> Sequence[tuple[int, Tensor, Tensor]]:
    """Return (nearest distance, farthest [B or 1, T], positions [B or 1, T]) of every bucket.

    Where a bucket is empty, the farthest is one less than the nearest.
    """
    reach = count - 2  # the oldest is in no bucket
    made = []
    for first, last in BUCKETS:
        capped = reach if last is None else reach.clamp(max=last)
        farthest = capped.clamp(min=first - 1)
        made.append((first, farthest, farthest - first + 1))
    return made


def _taken(running: Tensor, index: Tensor) -> Tensor:
    """Return rows of running sums [B, H, R + 1, D] at [T] or [B or 1, T]: [B, H, T, D]."""
    batch, heads, rows, width = running.shape
    index = index.clamp(0, rows - 1)
    if index.ndim == 1:
        return running.index_select(2, index)
    taken = index[:, None, :, None]
    return running.gather(2, taken.expand(batch, heads, taken.shape[2], width))


def _of_one(rows: Tensor, positions: Tensor, count: Tensor, weights: Tensor) -> Tensor:
    """Return c of a single token: one product with a weight a position."""
    per_position = _per_position(rows, positions, _shares_of_one(count, weights))
    mixed: Tensor = per_position @ rows.float()
    return mixed.reshape(rows.shape[0], 1, -1).to(rows.dtype)


def _carried_of_one(
    rows: Tensor, positions: Tensor, count: Tensor, weights: Tensor, sums: Tensor
) -> Tensor:
    """Return c of a single token: the far positions are all but the near ones of the sum."""
    *near, (_, _, far) = _shares_of_one(count, weights)
    reach = _buckets(count)[-2][1]  # the end of the last near bucket
    per_position = _per_position(rows, positions, [*near, (0, reach, -far)])
    share = far.unflatten(1, (rows.shape[1], -1))  # [B, H, heads / H, 1]
    mixed: Tensor = per_position @ rows.float() + share * sums
    return mixed.reshape(rows.shape[0], 1, -1)


Share = tuple[int, Tensor, Tensor]
"""A bucket's nearest distance, its farthest [B or 1, 1], each position's weight [B, heads, 1]."""


def _shares_of_one(count: Tensor, weights: Tensor) -> list[Share]:
    """Return what each position of every bucket weighs for a single token."""
    return [
        (first, last, weights[:, 0, :, i, None] * ((size > 0) / size.clamp(min=1)).unsqueeze(1))
        for i, (first, last, size) in enumerate(_buckets(count), start=1)
    ]


def _per_position(rows: Tensor, positions: Tensor, shares: Sequence[Share]) -> Tensor:
    """Return the weight of every row, [B, H, heads / H, R]."""
    lag = positions - torch.arange(rows.shape[2], device=rows.device)
    weight = torch.zeros((), device=rows.device)
    for first, last, share in shares:
        inside = ((lag >= first) & (lag <= last)).unsqueeze(1)  # [B or 1, 1, R]
        weight = weight + torch.where(inside, share, 0.0)
    grouped: Tensor = weight.unflatten(1, (rows.shape[1], -1))
    return grouped


def _shaped(per_token: Tensor) -> Tensor:
    """Return [B or 1, 1, T, 1] of something a token [B or 1, T]."""
    return per_token[:, None, :, None]


def _mixed(weights: Tensor, means: Sequence[Tensor]) -> Tensor:
    """Return [B, T, heads · D] of p [B, T, heads, 1 + buckets] and means [B, H, T, D]."""
    kv_heads = means[0].shape[1]
    shares = weights.transpose(1, 2).unflatten(1, (kv_heads, -1))  # [B, H, heads / H, T, 1 + b]
    parts = [shares[..., i, None] * mean.unsqueeze(2) for i, mean in enumerate(means, start=1)]
    mixed: Tensor = sum(parts[1:], parts[0])  # [B, H, heads / H, T, D]
    return mixed.flatten(1, 2).transpose(1, 2).flatten(2)
