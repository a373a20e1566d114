"""Value states in plain torch: the meaning of taps and averages, for any number of new tokens.

All of it follows from one number a token, n_t: how many positions it may attend to. In causal
attention these are the n_t latest ones, itself included::

    tap j       v_{t−j} where j < n_t, else 0
    average     e_t = Σ_{j<n_t} λ^j v_{t−j} / Σ_{j<n_t} λ^j        λ = DECAY
    mean        m_t = Σ_{j<n_t} v_{t−j} / n_t

n_t is read off the attention mask, so padding, packed documents and sliding windows need no further
care: where a document begins n_t is 1, and everything starts anew.

Two ways lead there. ``value_states`` reads the rows of all values that are in reach: those of this
call, or of any cache that keeps values. ``carried_states`` carries the two sums on from call to
call, for layers of ``nbl.cache`` that keep nothing else.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nbl_compiler.errors import CacheMismatchError
from nbl_compiler.value_states import DECAY

# Positions that the decaying average reaches back where it is computed from rows: the rest weighs
# DECAY^64 = 6e-7, a few roundings of float32.
REACH = 64


def count_of_mask(mask: Tensor) -> Tensor:
    """Return n_t [B or 1, T] of an attention mask [B, H, T, K] or [T, K].

    Args:
        mask: True, or a number that is not hugely negative, where attention is allowed.
    """
    return _allowed(mask).sum(-1)


def looks_back(mask: Tensor) -> Tensor:
    """Tell for each token whether it attends to itself and an unbroken run before it, and no more.

    Args:
        mask: As for ``count_of_mask``; its last columns are the tokens of this call.

    Returns:
        [B or 1, T], bool.
    """
    allowed = _allowed(mask)
    count = allowed.sum(-1)
    columns = torch.arange(mask.shape[-1], device=mask.device)
    own = columns[mask.shape[-1] - mask.shape[-2] :, None]
    run = (columns <= own) & (columns > own - count[..., None])
    return (allowed == run).all(-1)


def _allowed(mask: Tensor) -> Tensor:
    """Return whether any head may attend, [B or 1, T, K]."""
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    if allowed.ndim == 2:
        return allowed.unsqueeze(0)
    return allowed[:, 0] if allowed.shape[1] == 1 else allowed.any(1)


def count_without_mask(values: Tensor, before: int) -> Tensor:
    """Return n_t [1, T] of causal attention to everything.

    Args:
        values: The values of this call, [B, H, T, D].
        before: Number of positions of earlier calls.
    """
    return (torch.arange(1, values.shape[2] + 1, device=values.device) + before).unsqueeze(0)


def rows_of(states: Tensor) -> int:
    """Return T of values [B, H, T, D]."""
    return states.shape[2]


def rows_without(rows: Tensor, new: Tensor) -> int:
    """Return the number of rows [B, H, R, D] in front of the new ones [B, H, T, D]."""
    return rows.shape[2] - new.shape[2]


def last_positions(rows: Tensor, new: Tensor) -> Tensor:
    """Return where the new values [B, H, T, D] are in rows [B, H, R, D] that end with them, [T]."""
    return torch.arange(new.shape[2], device=rows.device) + rows_without(rows, new)


def joined_rows(past: Tensor, values: Tensor) -> Tensor:
    """Return earlier and new values as rows [B, H, R, D]."""
    return torch.cat([past.to(values.dtype), values], 2)


def newest_rows(rows: Tensor, past: Tensor) -> Tensor:
    """Return the newest of the rows, as many as ``past`` [B, H, r, D] holds."""
    kept = past.shape[2]
    return rows.narrow(2, rows.shape[2] - kept, kept).to(past.dtype)


def value_states(
    rows: Tensor, positions: Tensor, count: Tensor, taps: int, averages: bool
) -> Tensor:
    """Return what a map reads of the values.

    Args:
        rows: All values in reach, [B, H, R, D]; those that no n_t reaches may be any numbers (but
            not NaN: as in attention itself, their weight is 0).
        positions: Where the tokens of this call are among them, [T], consecutive.
        count: n_t, [B or 1, T].
        taps: Number w of earlier values.
        averages: Whether e and m are wanted.

    Returns:
        [B, T, (w + 2) · H · D] in the order v_{t−1} … v_{t−w}, e_t, m_t, in the dtype of the rows.
    """
    parts = _taps(rows, positions, count, taps)
    if averages:
        one = count.shape[1] == 1
        parts += _averages_of_one(rows, positions, count) if one else [
            _decaying_sum(rows, positions, count) / _decaying_total(count),
            _sum(rows, positions, count) / _column(count),
        ]  # fmt: skip
    return _side_by_side(parts, rows)


def carried_states(
    values: Tensor, count: Tensor, past: Tensor, sums: Tensor, taps: int
) -> tuple[Tensor, Tensor]:
    """Return the same with averages, from two sums in place of all rows; n_t has no window here.

    Args:
        values: Values of this call, [B, H, T, D].
        count: n_t, [B or 1, T].
        past: The values in front of them, [B, H, w, D].
        sums: Σ λ^j v and Σ v after the last call, [B, H, 2, D], float32.
        taps: Number w of earlier values.

    Returns:
        States [B, T, (w + 2) · H · D]; and the sums after this call.
    """
    rows = joined_rows(past, values)
    parts = _taps(rows, last_positions(rows, values), count, taps)
    own = last_positions(values, values)
    # Tokens whose document began in an earlier call carry on what was summed up there.
    carries = _column(count > own + 1)
    earlier = torch.where(carries, sums[:, :, :1] * DECAY ** (own + 1)[:, None], 0.0)
    before = torch.where(carries, sums[:, :, 1:], 0.0)
    if count.shape[1] == 1:
        decaying, plain = values.float() + earlier, values.float() + before
    else:
        here = count.minimum(own + 1)
        decaying = _decaying_sum(values, own, here) + earlier
        plain = _sum(values, own, here) + before
    parts += [decaying / _decaying_total(count), plain / _column(count)]
    return _side_by_side(parts, values), torch.cat([decaying[:, :, -1:], plain[:, :, -1:]], 2)


def with_states(x: Tensor, states: Tensor) -> Tensor:
    """Return [..., d + n]: the input of the map, and beside it the states [B, T, n]."""
    return torch.cat([x, states.reshape(*x.shape[:-1], states.shape[-1]).to(x.dtype)], -1)


def _column(per_token: Tensor) -> Tensor:
    """Return [B or 1, 1, T, 1] of numbers a token [B or 1, T], at least 1 (padding may have 0)."""
    shaped = per_token[:, None, :, None]
    return shaped if shaped.dtype == torch.bool else shaped.clamp(min=1)


def _decaying_total(count: Tensor) -> Tensor:
    """Return Σ_{j<n_t} λ^j, [B or 1, 1, T, 1]."""
    return (1 - DECAY ** _column(count).float()) / (1 - DECAY)


def _taps(rows: Tensor, positions: Tensor, count: Tensor, taps: int) -> list[Tensor]:
    """Return v_{t−1} … v_{t−w}, each [B, H, T, D], zero where they do not count."""
    return [
        torch.where(_column(count > lag), rows.index_select(2, (positions - lag).clamp(min=0)), 0.0)
        for lag in range(1, taps + 1)
    ]


def _averages_of_one(rows: Tensor, positions: Tensor, count: Tensor) -> list[Tensor]:
    """Return e and m of a single token, [B, H, 1, D]: one product with its weights."""
    lag = positions - torch.arange(rows.shape[2], device=rows.device)
    counts = ((lag >= 0) & (lag < count)).unsqueeze(1)  # [B or 1, 1, R]
    decayed = DECAY ** lag.clamp(min=0).float()
    weights = torch.cat([torch.where(counts, decayed, 0.0), counts.float()], 1)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)
    both = weights.unsqueeze(1) @ rows.float()
    return [both[:, :, :1], both[:, :, 1:]]


def _decaying_sum(rows: Tensor, positions: Tensor, count: Tensor) -> Tensor:
    """Return Σ_{j<n_t} λ^j v_{t−j} [B, H, T, D], in blocks of REACH tokens and the block before."""
    length = count.shape[1]
    padding = -length % REACH
    wanted = torch.arange(-REACH, length, device=rows.device) + positions[0]
    block = F.pad(rows.index_select(2, wanted.clamp(min=0)).float(), (0, 0, 0, padding))
    block = block.unflatten(2, (-1, REACH))
    pairs = torch.cat([block[:, :, :-1], block[:, :, 1:]], 3)  # [B, H, C, 2 · REACH, D]
    token = torch.arange(REACH, device=rows.device)
    lag = token[:, None] + REACH - torch.arange(2 * REACH, device=rows.device)
    near = (lag >= 0) & (lag < REACH)
    counts = F.pad(count, (0, padding)).unflatten(1, (-1, REACH))[..., None]  # [B or 1, C, 64, 1]
    weights = torch.where(near & (lag < counts), DECAY ** lag.clamp(min=0).float(), 0.0)
    return (weights.unsqueeze(1) @ pairs).flatten(2, 3).narrow(2, 0, length)


def _sum(rows: Tensor, positions: Tensor, count: Tensor) -> Tensor:
    """Return Σ_{j<n_t} v_{t−j} [B, H, T, D]: a difference of running sums, which need float64."""
    running = F.pad(rows.double().cumsum(2), (0, 0, 1, 0))
    end = running.index_select(2, positions + 1)
    start = (positions + 1 - count).clamp(min=0)[:, None, :, None]
    batch, heads, _, width = rows.shape
    taken = start.expand(batch, heads, start.shape[2], width)
    return (end - running.gather(2, taken)).float()


def _side_by_side(parts: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat([part.to(like.dtype).transpose(1, 2).flatten(2) for part in parts], -1)


@torch.library.custom_op("nbl::stored_states", mutates_args=())
def stored_states(past: Tensor, sums: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Stand for what a layer of ``nbl.cache`` stores, until the plan's pass knows it.

    Args:
        past: Values stored so far, [B, H, r, D].
        sums: Of the averages or of mixed values, [B, H, 2, 1 or 0, D].
        values: New values, [B, H, T, D].

    Raises:
        CacheMismatchError: whenever it is executed.
    """
    raise CacheMismatchError(
        "a cache from nbl.cache holds value states for this layer, but the layer runs dense: "
        'compile the model with backend="nbl" and the same plan, or use an ordinary cache'
    )


@stored_states.register_fake
def _(past: Tensor, sums: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(past), torch.empty_like(sums)
