"""What a planned model shall reach, and which settings may be used for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Literal

from nbl_compiler.config import FFN, Attention, Ridge, is_number
from nbl_compiler.errors import ConfigError


@dataclass(frozen=True)
class Budget:
    """Either a loss that must not be exceeded, or a speed-up to reach.

    Args:
        max_loss: Largest relative increase of perplexity, 0.02 for 2 %: the fastest plan within it
            is chosen.
        speedup: Speed-up over the dense model compiled by Inductor, predicted from bytes and
            arithmetic: the plan that loses least is chosen.
        context: Tokens in the KV cache of the step that is to be fast; of the prompt for
            ``phase="prefill"``.
        batch: Number of sequences.
        phase: ``"decode"`` (one token a sequence) or ``"prefill"``.
        int8: The linear layers will be held as torchao's int8 weights when the plan runs. Steps
            cost what they cost then; speed-ups are over the model as it was loaded. What rounding
            to int8 itself loses is not part of the loss.

    Raises:
        ConfigError: unless exactly one of ``max_loss`` and ``speedup`` is given, and in range.
    """

    max_loss: float | None = None
    speedup: float | None = None
    context: int = 2048
    batch: int = 1
    phase: Literal["decode", "prefill"] = "decode"
    int8: bool = False

    def __post_init__(self) -> None:
        if (self.max_loss is None) == (self.speedup is None):
            raise ConfigError("Budget: give either max_loss or speedup, not both")
        if self.max_loss is not None and not (is_number(self.max_loss) and 0 < self.max_loss < inf):
            raise ConfigError(
                f"Budget: max_loss={self.max_loss!r} must be positive: 0.02 is 2 % of perplexity"
            )
        if self.speedup is not None and not (is_number(self.speedup) and 1 < self.speedup < inf):
            raise ConfigError(f"Budget: speedup={self.speedup!r} must exceed 1")
        for name in ("context", "batch"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"Budget: {name}={value!r} must be an integer of at least 1")
        if self.phase not in ("decode", "prefill"):
            raise ConfigError(f"Budget: phase={self.phase!r} must be 'decode' or 'prefill'")
        if not isinstance(self.int8, bool):
            raise ConfigError(f"Budget: int8={self.int8!r} must be True or False")

    def __str__(self) -> str:
        held = ", int8 weights" if self.int8 else ""
        return f"{self.phase}, {self.context:,} tokens of context, batch {self.batch}{held}"


STATIC = FFN(keep=0.5)
GUARDED = FFN(keep=0.0, guard="predicted", capacity=0.2)
# Each token has outliers of its own: over more tokens a step they are most of the neurons, and a
# guard saves nothing.
GUARD_TOKENS = 4


@dataclass(frozen=True)
class Space:
    """The settings that a planner chooses from.

    Args:
        attention: How attention is linearized where it is, or None to leave it alone. Which sites
            is the planner's choice: ``count``, ``layers``, ``max_nmse`` and ``rank_by`` must be
            left as they are.
        ffns: Forms of folded FFNs, likewise; each site may take another. Empty to leave FFNs alone.
            By default a static half of the neurons, and a guard that chooses a fifth for each
            token.
        ridge: As in ``Config``, as are ``holdout`` and ``seed``.
        holdout: See there.
        seed: See there.

    Raises:
        ConfigError: if there is nothing to choose from, or options say which sites to take.
    """

    attention: Attention | None = field(default_factory=lambda: Attention(mixed=True))
    ffns: tuple[FFN, ...] = field(default=(STATIC, GUARDED))
    ridge: Ridge = "auto"
    holdout: float = 0.1
    seed: int = 0

    @classmethod
    def suited_to(cls, budget: Budget) -> Space:
        """Return the space without forms that cannot make the budget's step faster.

        Args:
            budget: Says how many tokens a step has. Guards gather rows of float weights.
        """
        tokens = budget.batch * (1 if budget.phase == "decode" else budget.context)
        guards = tokens <= GUARD_TOKENS and not budget.int8
        return cls(ffns=(GUARDED if guards else STATIC,))

    def __post_init__(self) -> None:
        object.__setattr__(self, "ffns", tuple(self.ffns))
        given: list[Attention | FFN] = [*self.ffns]
        if self.attention is not None:
            given.append(self.attention)
        if not given:
            raise ConfigError("Space: give attention or at least one FFN form to choose from")
        for one in given:
            if one.count is not None or one.layers is not None or one.max_nmse is not None:
                raise ConfigError(
                    f"Space: {type(one).__name__} says which sites to take (count, layers or "
                    "max_nmse); that is what the planner chooses"
                )
