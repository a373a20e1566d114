"""What the user asks for: typed, frozen, validated on construction."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf
from typing import Literal

from nbl_compiler.errors import ConfigError

Ridge = float | Literal["auto"]
Guard = Literal["off", "predicted", "exact"]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_selection(
    kind: str,
    count: int | None,
    layers: tuple[int | str, ...] | None,
    max_nmse: float | None,
) -> None:
    if count is not None and layers is not None:
        raise ConfigError(f"{kind}: give either `count` or `layers`, not both")
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 0):
        raise ConfigError(f"{kind}: count={count!r} must be an integer of at least 0")
    if max_nmse is not None and not (_is_number(max_nmse) and max_nmse > 0):
        raise ConfigError(f"{kind}: max_nmse={max_nmse!r} must be positive")
    for layer in layers or ():
        if isinstance(layer, bool) or not isinstance(layer, int | str):
            raise ConfigError(f"{kind}: layers holds {layer!r}; give site indices or site names")


@dataclass(frozen=True)
class Attention:
    """How attention sites are linearized.

    Args:
        count: Replace the ``count`` best sites by the ranking. With neither ``count`` nor
            ``layers``, every site within ``max_nmse`` is replaced, or, without ``max_nmse``
            either, the best quarter of the sites (rounded up).
        layers: Replace exactly these sites: indices in model order, or site names.
        max_nmse: Never replace a site whose held-out NMSE exceeds this.
        rank_by: ``"nmse"`` (held-out normalised mean squared error of the map), ``"loss"`` (what
            the maps do to the model's predictions, tried together on a batch that is set aside;
            better, slower, for causal language models) or ``"cca"``
            (the bound of NBL, arXiv 2505.21077, theorem 3.2).
        input: The map's input: ``"normed"``, what the projections read, or ``"residual"``, the
            residual stream before the norm (as in the paper's released code).
        taps: Number of value taps. Only 0 is supported.

    Raises:
        ConfigError: for contradictory or out-of-range options.
    """

    count: int | None = None
    layers: tuple[int | str, ...] | None = None
    max_nmse: float | None = None
    rank_by: Literal["nmse", "loss", "cca"] = "nmse"
    input: Literal["normed", "residual"] = "normed"
    taps: int = 0

    def __post_init__(self) -> None:
        if self.layers is not None:
            if isinstance(self.layers, str) or not isinstance(self.layers, Iterable):
                raise ConfigError(
                    f"Attention: layers={self.layers!r} must be a sequence of site indices or site "
                    "names"
                )
            object.__setattr__(self, "layers", tuple(self.layers))
        _check_selection("Attention", self.count, self.layers, self.max_nmse)
        if self.rank_by not in ("nmse", "loss", "cca"):
            raise ConfigError(
                f"Attention: rank_by={self.rank_by!r} must be 'nmse', 'loss' or 'cca'"
            )
        if self.input not in ("normed", "residual"):
            raise ConfigError(f"Attention: input={self.input!r} must be 'normed' or 'residual'")
        if self.taps != 0:
            raise ConfigError(
                f"Attention: taps={self.taps!r} is not supported by this release; use taps=0"
            )


@dataclass(frozen=True)
class Config:
    """Everything ``nbl.calibrate`` needs to know besides the model and the text.

    Args:
        attention: Options for attention sites, or None to leave attention alone.
        ridge: Ridge added to C_XX, relative to each input's variance, or ``"auto"`` to choose it
            per site on the held-out tokens.
        holdout: Fraction of the calibration tokens (in blocks) kept out of the fit, in [0, 0.5];
            their error ranks the sites. With 0, or with only a few of them, generalised
            cross-validation on the others does.
        seed: Seed of the (deterministic) choice of held-out blocks.

    Raises:
        ConfigError: for out-of-range options.
    """

    attention: Attention | None = field(default_factory=Attention)
    ridge: Ridge = "auto"
    holdout: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.attention is not None and not isinstance(self.attention, Attention):
            raise ConfigError(f"Config: attention={self.attention!r} must be nbl.Attention(...)")
        if self.ridge != "auto" and not (_is_number(self.ridge) and 0 <= self.ridge < inf):
            raise ConfigError(f"Config: ridge={self.ridge!r} must be 'auto' or at least 0")
        if not (_is_number(self.holdout) and 0 <= self.holdout <= 0.5):
            raise ConfigError(f"Config: holdout={self.holdout!r} must lie in [0, 0.5]")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ConfigError(f"Config: seed={self.seed!r} must be an integer")
