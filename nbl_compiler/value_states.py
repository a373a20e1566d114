"""What a linearized attention layer may remember of the past: which value states its map reads.

    y_t = W x_t + Σ_{j=1..w} U_j v_{t−j} + A e_t + M m_t + b
    y_t = W x_t + C c_t + b

v is what attention would have mixed, the values of all key/value heads. e and m are averages over
the positions that token t may attend to: e a decaying one, m the plain mean (what attention with
equal scores would give); see ``nbl_compiler.lowering.value_states``. c mixes values with weights
that x_t gives to distances, for each query head its own: ``nbl_compiler.lowering.mixed_values``.
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

BUCKETS: tuple[tuple[int, int | None], ...] = (
    (0, 0), (1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, None)
)  # fmt: skip
"""Of mixed values: nearest and farthest distance of the positions that get one weight together."""
MIX_REACH = max(last for _, last in BUCKETS if last is not None)
"""How far the near buckets reach back: as many values a layer keeps, and the sum of the others."""


@dataclass(frozen=True)
class States:
    """The states of one site: vectors as wide as the values of all heads, or mixed values.

    Args:
        taps: Number w of earlier values v_{t−1} … v_{t−w}.
        averages: Whether the map also reads the decaying average and the mean.
        mixed: Whether it reads mixed values, and nothing else of the values.
    """

    taps: int = 0
    averages: bool = False
    mixed: bool = False

    def __bool__(self) -> bool:
        return self.taps > 0 or self.averages or self.mixed

    @property
    def rows(self) -> int:
        """Number of earlier values that a layer keeps for them, beside sums."""
        return MIX_REACH if self.mixed else self.taps

    @property
    def sums(self) -> int:
        """Number of running sums that carry them on."""
        return 1 if self.mixed else 2 * self.averages

    @property
    def vectors(self) -> int:
        """Number of vectors as wide as the values of all heads that the map reads besides x."""
        return self.taps + 2 * self.averages

    def __str__(self) -> str:
        if self.mixed:
            return "mixed values"
        taps = f"{self.taps} tap{'' if self.taps == 1 else 's'}" if self.taps else ""
        return " and ".join(part for part in (taps, "averages" if self.averages else "") if part)


NO_STATES = States()


def states_of(details: Mapping[str, Any]) -> States:
    """Return the states of a plan's site from its ``details``; none in plans without taps."""
    return States(
        int(details.get("taps", 0)),
        bool(details.get("averages", False)),
        bool(details.get("mixed", False)),
    )


@dataclass(frozen=True, eq=False)
class Gates:
    """What turns a hidden state into weights of distances (``lowering.mixed_values``).

    Args:
        weight: g, [heads, 1 + buckets, d].
        offset: o, [heads, 1 + buckets].
    """

    weight: Tensor
    offset: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Return them under the names that they have in a plan."""
        return {"gates": self.weight, "gate_offsets": self.offset}


def gates_of(tensors: Mapping[str, Tensor]) -> Gates | None:
    """Return the gates of a plan's site from its tensors; None if it has none."""
    if "gates" not in tensors:
        return None
    return Gates(tensors["gates"], tensors["gate_offsets"])


def split_weight(weight: Tensor, width: int, states: States) -> dict[str, Tensor]:
    """Cut a map of [x, states] into the tensors of a plan.

    Args:
        weight: [d_out, d + vectors · n], or [d_out, d + heads · D] with mixed values.
        width: d, the width of x.
        states: What follows x.

    Returns:
        ``weight`` [d_out, d], and as far as there are such states ``taps`` [w, d_out, n],
        ``averages`` [2, d_out, n] (decaying, mean), or ``mix`` [d_out, heads · D].
    """
    parts = {"weight": weight[:, :width].contiguous()}
    if states.mixed:
        parts["mix"] = weight[:, width:].contiguous()
    if not states.vectors:
        return parts
    rest = weight[:, width:].unflatten(1, (states.vectors, -1)).movedim(1, 0)
    if states.taps:
        parts["taps"] = rest[: states.taps].contiguous()
    if states.averages:
        parts["averages"] = rest[states.taps :].contiguous()
    return parts


def joined_weight(tensors: Mapping[str, Tensor]) -> Tensor:
    """Undo ``split_weight``: return [d_out, d + …]."""
    import torch  # here, because configuration needs this file and importing the package is cheap

    parts = [tensors["weight"]]
    for name in ("taps", "averages"):
        if name in tensors:
            parts += list(tensors[name])
    if "mix" in tensors:
        parts.append(tensors["mix"])
    return torch.cat(parts, 1)
