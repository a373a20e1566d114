"""What the user asks for: typed, frozen, validated on construction."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf
from typing import Literal, get_args

from nbl_compiler.errors import ConfigError
from nbl_compiler.value_states import States

Ridge = float | Literal["auto"]
Guard = Literal["off", "predicted", "exact"]
Predictor = Literal["auto", "none", "low_rank", "quantized_2", "quantized_4", "quantized_8"]
GUARDS: tuple[str, ...] = get_args(Guard)
PREDICTORS: tuple[str, ...] = get_args(Predictor)


def is_number(value: object) -> bool:
    """Tell whether an option is a number (``True`` is none)."""
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
    if max_nmse is not None and not (is_number(max_nmse) and max_nmse > 0):
        raise ConfigError(f"{kind}: max_nmse={max_nmse!r} must be positive")
    for layer in layers or ():
        if isinstance(layer, bool) or not isinstance(layer, int | str):
            raise ConfigError(f"{kind}: layers holds {layer!r}; give site indices or site names")


def _layers(kind: str, layers: object) -> tuple[int | str, ...] | None:
    if layers is None:
        return None
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise ConfigError(
            f"{kind}: layers={layers!r} must be a sequence of site indices or site names"
        )
    return tuple(layers)


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
            the maps do to the model's output, tried together on text that is set aside; better,
            slower) or ``"cca"`` (the bound of NBL, arXiv 2505.21077, theorem 3.2).
        input: The map's input: ``"normed"``, what the projections read, or ``"residual"``, the
            residual stream before the norm (as in the paper's released code).
        taps: Number w of value taps: the map also reads the values v_{t−1} … v_{t−w} that attention
            would have mixed. A layer then stores a few vectors (``nbl.cache``), or in an ordinary
            cache its values; without, nothing. 0 is NBL as published.
        averages: With taps, also two averages of all values that the token may attend to (a
            decaying one and the mean). Of taps and averages a site keeps what lowers its held-out
            error. Sites whose attention is not causal, or whose values are projected in several
            steps, read neither.
        mixed: Instead of taps and averages the map reads mixed values: what attention would give
            if its weights depended on the token that asks and on distances, not on the tokens that
            are asked. A layer then keeps 16 values and one sum. Much closer than the others; its
            gates are fitted to attention's own weights (two passes over some of the text), and
            half of the text is gone through again with its most frequent tokens replaced.

    Raises:
        ConfigError: for contradictory or out-of-range options.
    """

    count: int | None = None
    layers: tuple[int | str, ...] | None = None
    max_nmse: float | None = None
    rank_by: Literal["nmse", "loss", "cca"] = "nmse"
    input: Literal["normed", "residual"] = "normed"
    taps: int = 0
    averages: bool = True
    mixed: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", _layers("Attention", self.layers))
        _check_selection("Attention", self.count, self.layers, self.max_nmse)
        if self.rank_by not in ("nmse", "loss", "cca"):
            raise ConfigError(
                f"Attention: rank_by={self.rank_by!r} must be 'nmse', 'loss' or 'cca'"
            )
        if self.input not in ("normed", "residual"):
            raise ConfigError(f"Attention: input={self.input!r} must be 'normed' or 'residual'")
        if not isinstance(self.taps, int) or isinstance(self.taps, bool) or self.taps < 0:
            raise ConfigError(f"Attention: taps={self.taps!r} must be an integer of at least 0")
        if not isinstance(self.averages, bool):
            raise ConfigError(f"Attention: averages={self.averages!r} must be True or False")
        if not isinstance(self.mixed, bool):
            raise ConfigError(f"Attention: mixed={self.mixed!r} must be True or False")
        if self.mixed and self.taps:
            raise ConfigError(
                "Attention: mixed values take the place of taps and averages; give `mixed` or "
                "`taps`, not both"
            )

    @property
    def states(self) -> States:
        """The most that a site's map may read of the values."""
        return States(self.taps, self.averages and self.taps > 0, self.mixed)


@dataclass(frozen=True)
class FFN:
    """How FFN sites are folded (TARDIS, arXiv 2501.10054, and beyond it for gated FFNs).

    ``keep`` of the neurons stay a small dense FFN; all others become one linear map. With a guard,
    the neurons that the map serves badly on a token (its *outliers*) are put right one by one from
    the original weights.

    Args:
        count: Fold the ``count`` best sites by the ranking. With neither ``count`` nor
            ``layers``, every site within ``max_nmse`` is folded, or, without ``max_nmse`` either,
            the best quarter of the sites (rounded up).
        layers: Fold exactly these sites: indices in model order, or site names.
        max_nmse: Never fold a site whose held-out NMSE exceeds this.
        keep: Share of the neurons that stay dense, in [0, 1].
        guard: ``"off"``; ``"predicted"``: a predictor picks ``capacity`` outliers a token; or
            ``"exact"`` (plain FFNs): every neuron outside its calibrated range is an outlier, and
            the error of the rest is certified (the plan's ``bound``) for every input.
        capacity: Most outliers a token, as a share of the folded neurons. By default 0.05 for
            ``"predicted"``; for ``"exact"``, where a token with more runs dense, what all but 1 %
            of the calibration tokens need.
        coverage: For ``"exact"``: share of all pre-activations that the ranges of a site's folded
            neurons shall hold, in (0, 1]. It is divided between sites and neurons by what an
            error there costs.
        predictor: ``"low_rank"``, ``"quantized_8"``, ``"quantized_4"``, ``"quantized_2"`` or
            ``"none"`` (the true pre-activations: reads all of W1). ``"auto"`` is ``"quantized_4"``
            for ``"predicted"`` and ``"none"`` for ``"exact"``.
        rank: Of the low-rank predictor.
        values: For ``"predicted"``: what outliers are put right with. ``"original"``: their true
            values, from gathered rows of the weights. ``"predicted"``: their predicted ones, so
            that only the column of W2 is read, and the same bytes hold two (gated: three) times
            the capacity.
        rank_by: ``"loss"`` (what folding does to the model's output, tried on text that is set
            aside) or ``"nmse"`` (held-out error of the site alone; no trials, but the first
            layers, which often fit best, are the ones that a model can least do without).

    Raises:
        ConfigError: for contradictory or out-of-range options.
    """

    count: int | None = None
    layers: tuple[int | str, ...] | None = None
    max_nmse: float | None = None
    keep: float = 0.25
    guard: Guard = "off"
    capacity: float | None = None
    coverage: float = 0.9
    predictor: Predictor = "auto"
    rank: int = 64
    values: Literal["original", "predicted"] = "original"
    rank_by: Literal["loss", "nmse"] = "loss"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", _layers("FFN", self.layers))
        _check_selection("FFN", self.count, self.layers, self.max_nmse)
        if self.rank_by not in ("loss", "nmse"):
            raise ConfigError(f"FFN: rank_by={self.rank_by!r} must be 'loss' or 'nmse'")
        if not (is_number(self.keep) and 0 <= self.keep <= 1):
            raise ConfigError(f"FFN: keep={self.keep!r} must lie in [0, 1]")
        if self.guard not in GUARDS:
            raise ConfigError(f"FFN: guard={self.guard!r} must be 'off', 'predicted' or 'exact'")
        if self.capacity is not None and not (is_number(self.capacity) and 0 < self.capacity <= 1):
            raise ConfigError(f"FFN: capacity={self.capacity!r} must lie in (0, 1]")
        if not (is_number(self.coverage) and 0 < self.coverage <= 1):
            raise ConfigError(f"FFN: coverage={self.coverage!r} must lie in (0, 1]")
        if self.predictor not in PREDICTORS:
            raise ConfigError(
                f"FFN: predictor={self.predictor!r} must be one of {', '.join(PREDICTORS)}"
            )
        if self.guard == "exact" and self.predictor == "low_rank":
            raise ConfigError(
                "FFN: a low-rank predictor has no certificate; for guard='exact' use 'none' or a "
                "quantized one"
            )
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ConfigError(f"FFN: rank={self.rank!r} must be an integer of at least 1")
        if self.values not in ("original", "predicted"):
            raise ConfigError(f"FFN: values={self.values!r} must be 'original' or 'predicted'")
        if self.values == "predicted" and (
            self.guard != "predicted" or self.predictor_kind == "none"
        ):
            raise ConfigError(
                "FFN: values='predicted' needs guard='predicted' and a predictor other than 'none'"
            )

    @property
    def predictor_kind(self) -> str:
        """The predictor that ``"auto"`` stands for."""
        if self.predictor != "auto":
            return self.predictor
        return "quantized_4" if self.guard == "predicted" else "none"


@dataclass(frozen=True)
class Config:
    """Everything ``nbl.calibrate`` needs to know besides the model and the text.

    Args:
        attention: Options for attention sites, or None to leave attention alone.
        ffn: Options for FFN sites, or None to leave FFNs alone.
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
    ffn: FFN | None = None
    ridge: Ridge = "auto"
    holdout: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.attention is not None and not isinstance(self.attention, Attention):
            raise ConfigError(f"Config: attention={self.attention!r} must be nbl.Attention(...)")
        if self.ffn is not None and not isinstance(self.ffn, FFN):
            raise ConfigError(f"Config: ffn={self.ffn!r} must be nbl.FFN(...)")
        if self.ridge != "auto" and not (is_number(self.ridge) and 0 <= self.ridge < inf):
            raise ConfigError(f"Config: ridge={self.ridge!r} must be 'auto' or at least 0")
        if not (is_number(self.holdout) and 0 <= self.holdout <= 0.5):
            raise ConfigError(f"Config: holdout={self.holdout!r} must lie in [0, 0.5]")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ConfigError(f"Config: seed={self.seed!r} must be an integer")
