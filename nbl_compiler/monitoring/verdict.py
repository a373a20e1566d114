"""Whether what a site has read is still what it was calibrated on."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite, nan, sqrt
from typing import Literal

from nbl_compiler.errors import ConfigError
from nbl_compiler.guard_counters import GuardCounts, PerToken
from nbl_compiler.plans import Kind, Site
from nbl_compiler.rows import HOLDOUT_BLOCK

State = Literal["fits", "drifted", "overflows", "undecided", "unknown"]


@dataclass(frozen=True)
class MonitorLimits:
    """Where a site no longer fits. The defaults are explained in ``docs/monitoring.md``.

    Args:
        shift: Largest root mean square, over components, of the mean of z: how many calibrated
            standard deviations the inputs have moved.
        energy: Largest mean of z², which is 1 over the calibration text; its reciprocal is the
            least.
        dense_share: How much larger the share of tokens on the dense path may be than it was over
            the calibration text.
        tokens: Fewer than these decide nothing.
    """

    shift: float = 0.3
    energy: float = 2.0
    dense_share: float = 0.05
    tokens: int = 256

    def __post_init__(self) -> None:
        wanted = {
            "shift": (self.shift > 0, "positive"),
            "energy": (self.energy > 1, "above 1"),
            "dense_share": (0 < self.dense_share <= 1, "in (0, 1]"),
            "tokens": (self.tokens >= 1, "at least 1"),
        }
        for name, (good, what) in wanted.items():
            if not good:
                raise ConfigError(f"MonitorLimits({name}={getattr(self, name)!r}) must be {what}")

    def shift_for(self, tokens: int, calibrated: float) -> float:
        """Return the limit of the shift, with room for sampling noise.

        The mean of n independent tokens strays by 1/√n standard deviations. Neighbouring tokens are
        not independent, so a block of 64 counts as one (what the hold-out is made of, too):
        √(shift² + 64/n + 64/calibrated).

        Args:
            tokens: n, how many were seen.
            calibrated: How many the plan was calibrated on.
        """
        return sqrt(self.shift**2 + HOLDOUT_BLOCK * (1 / tokens + 1 / calibrated))


@dataclass(frozen=True)
class SiteTraffic(PerToken):
    """What one site has read while it was monitored.

    Args:
        site: Its name.
        kind: ``"attention"`` or ``"ffn"``.
        tokens: Tokens seen, padding included.
        shift: Root mean square, over components, of the mean of z = (x − mean) / scale, in
            calibrated standard deviations. 0 if nothing has changed; NaN where it is not known.
        energy: Mean of z² over tokens and components, likewise; 1 if nothing has changed.
        outliers: Neurons that the guard flagged; 0 without a guard.
        dense_tokens: Tokens on the guard's dense path.
        state: ``"fits"``, ``"drifted"`` (inputs unlike the calibration text's), ``"overflows"``
            (the guard's capacity is too small for them), ``"undecided"`` (too few tokens) or
            ``"unknown"`` (the plan does not know the distribution).
        reason: Why, in a few words.
    """

    site: str
    kind: Kind
    tokens: int
    shift: float
    energy: float
    outliers: int
    dense_tokens: int
    state: State
    reason: str


@dataclass(frozen=True)
class Seen:
    """Sums over one site's tokens in one window, from all graphs.

    Args:
        tokens: Their number.
        shift: As in ``SiteTraffic``, as is ``energy``.
        energy: See there.
        guard: What the guard did; None without one.
    """

    tokens: int = 0
    shift: float = nan
    energy: float = nan
    guard: GuardCounts | None = None


def judge(site: Site, seen: Seen, limits: MonitorLimits) -> SiteTraffic:
    """Return what a site has read, with the verdict."""
    state, reason = _state(site, seen, limits)
    guard = seen.guard or GuardCounts(0, 0, 0, 0)
    return SiteTraffic(
        site.name, site.kind, seen.tokens, seen.shift, seen.energy, guard.outliers,
        guard.dense_tokens, state, reason,
    )  # fmt: skip


def _state(site: Site, seen: Seen, limits: MonitorLimits) -> tuple[State, str]:
    if seen.tokens < limits.tokens:
        return "undecided", f"fewer than {limits.tokens} tokens"
    if site.inputs:
        drift = _drift(site, seen, limits)
        if drift:
            return "drifted", drift
    if seen.guard is not None:
        calibrated = float(site.details.get("dense_tokens", 0.0))
        if seen.guard.dense_share > calibrated + limits.dense_share:
            share = f"{seen.guard.dense_share:.1%} of the tokens run dense"
            return "overflows", f"{share}, {calibrated:.1%} when calibrated"
    if not site.inputs:
        return "unknown", "the plan does not hold the distribution of its inputs"
    return "fits", ""


def _drift(site: Site, seen: Seen, limits: MonitorLimits) -> str:
    """Return what is wrong with the distribution of x, or an empty string."""
    if not isfinite(seen.shift) or not isfinite(seen.energy):
        return "inputs were NaN or infinite"
    calibrated = float(site.details.get("tokens") or inf)
    limit = limits.shift_for(seen.tokens, calibrated)
    if seen.shift > limit:
        return f"shift {seen.shift:.2f} exceeds {limit:.2f}"
    if seen.energy > limits.energy:
        return f"energy {seen.energy:.2f} exceeds {limits.energy:.2f}"
    if seen.energy < 1 / limits.energy:
        return f"energy {seen.energy:.2f} is below {1 / limits.energy:.2f}"
    return ""
