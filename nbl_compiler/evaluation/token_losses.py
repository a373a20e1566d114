"""What the dense model and the plan say of every token of the same rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nbl_compiler.progress import token_bar

# Positions whose log-probabilities are held at once: a vocabulary is the widest tensor there is.
_POSITIONS = 256


@dataclass(frozen=True)
class TokenLosses:
    """Per row and predicted position, all [R, T − 1] float64.

    Args:
        dense: Cross-entropy of the next token under the dense model, in nats.
        nbl: The same under the plan.
        divergence: Σ_v p(v) (log p(v) − log q(v)), p dense, q under the plan, in nats.
        agrees: 1 where both find the same token most likely.
    """

    dense: Tensor
    nbl: Tensor
    divergence: Tensor
    agrees: Tensor

    def sums(self, units: Tensor) -> Tensor:
        """Return [U, 5]: what every unit adds up to, and how many tokens.

        Args:
            units: The unit (document) of each row, [R] int64.
        """
        parts = (self.dense, self.nbl, self.divergence, self.agrees, torch.ones_like(self.dense))
        rows = torch.stack([part.sum(1) for part in parts], 1)
        names = units.unique(return_inverse=True)[1]
        made = torch.zeros(int(names.max()) + 1, len(parts), dtype=torch.float64)
        return made.index_add_(0, names, rows)


def token_losses(
    dense: Callable[..., Any], nbl: Callable[..., Any], rows: Iterable[Tensor], *, progress: bool
) -> TokenLosses:
    """Run both models over rows of one length, without a KV cache.

    Args:
        dense: The dense model.
        nbl: The model under a plan.
        rows: Token ids [1, T].
        progress: Show a bar.
    """
    rows = list(rows)
    made: list[Tensor] = []
    with torch.no_grad(), token_bar(len(rows), "evaluating", progress) as bar:
        for ids in rows:
            logits = [m(input_ids=ids, use_cache=False).logits[0, :-1] for m in (dense, nbl)]
            target = ids[0, 1:]
            spans = range(0, len(target), _POSITIONS)
            parts = [_compare(*(one[i : i + _POSITIONS] for one in (*logits, target)))
                     for i in spans]  # fmt: skip
            made.append(torch.cat(parts, 1).cpu())
            bar(target.numel())
    return TokenLosses(*torch.stack(made, 1))


def _compare(dense: Tensor, nbl: Tensor, target: Tensor) -> Tensor:
    """Return loss, loss, divergence and agreement of some positions, [4, n] float64."""
    p, q = (one.float().log_softmax(-1) for one in (dense, nbl))
    agrees = p.argmax(-1) == q.argmax(-1)
    losses = [-one.gather(-1, target[:, None])[:, 0] for one in (p, q)]
    divergence = (p.exp() * (p - q)).sum(-1)
    return torch.stack([*losses, divergence, agrees.to(divergence)]).double()
