"""What a linearized attention layer may remember of the past: which value states its map reads.

    y_t = W x_t + Σ_{j=1..w} U_j v_{t−j} + A e_t + M m_t + b

v is what attention would have mixed, the values of all key/value heads. e and m are averages over
the positions that token t may attend to: e a decaying one, m the plain mean (what attention with
equal scores would give). How they are computed is in ``nbl_compiler.lowering.value_states``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

DECAY = 0.8
"""Of the decaying average: position t − j has weight DECAY^j. Slower and faster ones gave larger
errors beside one tap and the mean (``benchmarks/value_states.py``)."""


@dataclass(frozen=True)
class States:
    """The states of one site, each a vector as wide as the values of all heads.

    Args:
        taps: Number w of earlier values v_{t−1} … v_{t−w}.
        averages: Whether the map also reads the decaying average and the mean.
    """

    taps: int = 0
    averages: bool = False

    def __bool__(self) -> bool:
        return self.taps > 0 or self.averages

    @property
    def vectors(self) -> int:
        """Number of vectors that the map reads besides x."""
        return self.taps + 2 * self.averages

    def __str__(self) -> str:
        taps = f"{self.taps} tap{'' if self.taps == 1 else 's'}" if self.taps else ""
        return " and ".join(part for part in (taps, "averages" if self.averages else "") if part)


NO_STATES = States()


def states_of(details: Mapping[str, Any]) -> States:
    """Return the states of a plan's site from its ``details``; none in plans without taps."""
    return States(int(details.get("taps", 0)), bool(details.get("averages", False)))


def split_weight(weight: Tensor, width: int, states: States) -> dict[str, Tensor]:
    """Cut a map of [x, states] into the tensors of a plan.

    Args:
        weight: [d_out, d + vectors · n].
        width: d, the width of x.
        states: What follows x.

    Returns:
        ``weight`` [d_out, d], and as far as there are such states ``taps`` [w, d_out, n] and
        ``averages`` [2, d_out, n] (decaying, mean).
    """
    parts = {"weight": weight[:, :width].contiguous()}
    if not states:
        return parts
    rest = weight[:, width:].unflatten(1, (states.vectors, -1)).movedim(1, 0)
    if states.taps:
        parts["taps"] = rest[: states.taps].contiguous()
    if states.averages:
        parts["averages"] = rest[states.taps :].contiguous()
    return parts


def joined_weight(tensors: Mapping[str, Tensor]) -> Tensor:
    """Undo ``split_weight``: return [d_out, d + vectors · n]."""
    import torch  # here, because configuration needs this file and importing the package is cheap

    parts = [tensors["weight"]]
    for name in ("taps", "averages"):
        if name in tensors:
            parts += list(tensors[name])
    return torch.cat(parts, 1)
