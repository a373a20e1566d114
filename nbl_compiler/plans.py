"""The plan: what calibration decided for every site, with its tensors, errors and reasons."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite
from os import PathLike
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from nbl_compiler.errors import ConfigError
from nbl_compiler.fingerprint import Sketch
from nbl_compiler.guard_counters import new_counters
from nbl_compiler.int8_weights import Int8Matrix, quantize_rows
from nbl_compiler.value_states import joined_weight, states_of

Made = TypeVar("Made")
Kind = Literal["attention", "ffn"]
INPUT_STATISTICS = ("input_mean", "input_scale")
"""Names of a site's tensors that describe what its map reads, rather than the map."""
Decision = Literal["rewritten", "kept", "rejected"]


@dataclass(frozen=True, eq=False)
class Site:
    """One place in the model and what the plan does there.

    Args:
        name: Module path (``model.layers.3.self_attn``), or an ordinal where there is none.
        kind: ``"attention"`` or ``"ffn"``.
        decision: ``"rewritten"``, ``"kept"`` (matched, left dense) or ``"rejected"``.
        reason: Why, in one sentence.
        nmse: Training NMSE of the replacement, E‖y − ŷ‖² / E‖y − E y‖² (nan if rejected).
        holdout_nmse: The same on held-out rows (or by cross-validation without any).
        cca_bound: Σ (1 − ρ_i²), NBL's theorem 3.2 (nan if rejected).
        tensors: For a rewritten site ``weight`` [d_out, d] and ``bias`` [d_out], float32, with
            y = x @ weight.T + bias for attention; with value states also ``taps`` [w, d_out, n]
            and ``averages`` [2, d_out, n] (``nbl_compiler.value_states``). An FFN adds its kept
            neurons (``kept`` [k] int64, ``down`` [d_out, k]: their refitted columns of W2), and
            with a guard the slopes, ranges, predictor and certified ``bound`` [d_out] (see
            ``docs/passes/fold_ffn.md``). Empty otherwise.
        inputs: For a rewritten site the calibrated distribution of what its map reads, per
            component (``nbl_compiler.monitoring.statistics``). Empty in plans of older releases.
        details: Plain numbers, strings and lists: ``input``, ``ridge``, ``prior`` (what the ridge
            shrinks towards: ``"zero"`` or ``"own weights"``), ``rank``, ``tokens``,
            ``width_in``, ``width_out``, ``parameters`` (how many the region reads),
            ``parameters_read`` (of a folded FFN, for one token), and ``weights`` (which of the
            plan's fingerprint they are).
    """

    name: str
    kind: Kind
    decision: Decision
    reason: str
    nmse: float = float("nan")
    holdout_nmse: float = float("nan")
    cca_bound: float = float("nan")
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def guarded(self) -> bool:
        """Whether it is a folded FFN with an outlier guard."""
        return self.details.get("form") == "guarded"

    @property
    def parameters_read(self) -> int:
        """How many parameters one token reads here once the site is rewritten."""
        own = sum(tensor.numel() for tensor in self.tensors.values())
        return int(self.details.get("parameters_read") or own)

    def header(self) -> dict[str, Any]:
        """Return everything but the tensors (see ``to_json``)."""
        return {
            "name": self.name,
            "kind": self.kind,
            "decision": self.decision,
            "reason": self.reason,
            "nmse": self.nmse,
            "holdout_nmse": self.holdout_nmse,
            "cca_bound": self.cca_bound,
            "details": dict(self.details),
        }


@dataclass(frozen=True, eq=False)
class Plan:
    """The calibrated artefact. Compared by identity; two equal plans have the same ``digest``.

    Args:
        sites: Every site of the model, in model order.
        fingerprint: Sketches of the model's weights.
        model: What was calibrated, for people (class name and sizes).
        config: The configuration that made it, for people.
    """

    sites: tuple[Site, ...] = ()
    fingerprint: tuple[Sketch, ...] = ()
    model: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    _cast: dict[tuple[str, str, torch.dtype, torch.device], Tensor] = field(
        default_factory=dict, repr=False, init=False
    )
    _made: dict[tuple[Any, ...], Any] = field(default_factory=dict, repr=False, init=False)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of every decision and tensor, as 64 hexadecimal digits."""
        header = json.dumps(to_json(self.header()), sort_keys=True, allow_nan=False)
        state = hashlib.sha256(header.encode())
        for name, tensor in sorted(self.tensors().items()):
            state.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            data = tensor.detach().cpu().contiguous().view(-1)
            state.update(data.view(torch.uint8).numpy().tobytes() if data.numel() else b"")
        return state.hexdigest()

    @property
    def rewritten(self) -> tuple[Site, ...]:
        """The sites that the plan replaces."""
        return tuple(site for site in self.sites if site.decision == "rewritten")

    def header(self) -> dict[str, Any]:
        """Return everything but the tensors (see ``to_json``)."""
        return {
            "model": self.model,
            "config": dict(self.config),
            "fingerprint": [s.header() for s in self.fingerprint],
            "sites": [site.header() for site in self.sites],
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor, named ``<site>/<tensor>``."""
        return {
            f"{site.name}/{key}": tensor
            for site in self.sites
            for key, tensor in {**site.tensors, **site.inputs}.items()
        }

    def site(self, name: str) -> Site:
        """Return the site of that name.

        Raises:
            ConfigError: if there is none.
        """
        for site in self.sites:
            if site.name == name:
                return site
        known = ", ".join(site.name for site in self.sites[:4])
        raise ConfigError(f"the plan has no site {name!r}; it has {known}, …")

    def find(self, name: str, kind: Kind) -> Site | None:
        """Return the site a graph calls ``name``.

        The graph's root may lie above the calibrated model (a wrapper) or below it (the base
        model of a causal LM): then one name ends in the other, and only one such site may exist.
        """
        sites = [site for site in self.sites if site.kind == kind]
        for site in sites:
            if site.name == name:
                return site
        near = [
            site
            for site in sites
            if name.endswith("." + site.name) or site.name.endswith("." + name)
        ]
        return near[0] if len(near) == 1 else None

    def tensor(self, site: Site, key: str, like: Tensor) -> Tensor:
        """Return a site's tensor in the dtype and on the device of ``like``.

        Cast once and kept, so that prefill and decode graphs share one copy.
        """
        slot = (site.name, key, like.dtype, like.device)
        if slot not in self._cast:
            with torch.inference_mode(False):  # what is made here outlives the caller's mode
                self._cast[slot] = site.tensors[key].to(like.device, like.dtype)
        return self._cast[slot]

    def joined_weight(self, site: Site, like: Tensor) -> Tensor:
        """Return an attention site's map of [x, value states], [d_out, d + …], for ``like``."""
        if not states_of(site.details):
            return self.tensor(site, "weight", like)
        return self.remember(
            (site.name, "joined_weight", like.dtype, like.device),
            lambda: joined_weight(site.tensors).to(like.device, like.dtype),
        )

    def int8_weight(self, site: Site, like: Tensor) -> Int8Matrix:
        """Return ``joined_weight`` as int8, one scale a row, on the device of ``like``."""

        def make() -> Int8Matrix:
            tensors = site.tensors
            exact = joined_weight(tensors) if states_of(site.details) else tensors["weight"]
            return quantize_rows(exact.to(like.device))

        return self.remember((site.name, "int8_weight", like.device), make)

    def remember(self, key: tuple[Any, ...], make: Callable[[], Made]) -> Made:
        """Return what ``make`` returned for this key when it was first asked for.

        For what is made of the plan and a model's weights together: prefill and decode graphs
        share one copy, also after the model's own weights were released.
        """
        if key not in self._made:
            with torch.inference_mode(False), torch.no_grad():
                self._made[key] = make()
        made: Made = self._made[key]
        return made

    def counters(self, site: str, device: torch.device, of: int | None = None) -> Tensor:
        """Return the counters of a guarded site on a device (``nbl_compiler.guard_counts``).

        All graphs share them but those that count apart, by a number of their own.
        """
        return self.remember((site, "counters", device, of), lambda: new_counters(device))

    def all_counters(self) -> list[tuple[str, Tensor]]:
        """Return (site name, counters) for every guarded site and device in use."""
        return [(key[0], value) for key, value in self._made.items() if key[1] == "counters"]

    def live_tensors(self) -> list[Tensor]:
        """Return every tensor that the plan holds, copies for compiled graphs included."""
        made: list[Tensor] = [*self.tensors().values(), *self._cast.values()]
        for value in self._made.values():
            parts = [value] if isinstance(value, Tensor) else list(vars(value).values())
            for part in parts:
                made += [t for t in (part if isinstance(part, list) else [part]) if _is_tensor(t)]
        return made

    def save(self, path: str | PathLike[str]) -> None:
        """Write one safetensors file with a JSON header, atomically.

        Raises:
            OSError: if the folder cannot be written; an existing file is then left as it was.
        """
        from nbl_compiler.plan_file import save_plan

        save_plan(self, path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Plan:
        """Read a plan back, bit for bit.

        Raises:
            FileNotFoundError: if there is no such file.
            PlanFormatError: if the file is truncated, edited, or of an unknown version.
        """
        from nbl_compiler.plan_file import load_plan

        return load_plan(path)

    def __str__(self) -> str:
        from nbl_compiler.report import plan_table, render

        return render(plan_table(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        return self  # immutable: a deep-copied model may share it


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def to_json(value: Any) -> Any:
    """Return a copy in which every number is one that strict JSON can write.

    JSON has no NaN and no infinity; they become ``{"float": "nan"}``, ``{"float": "inf"}`` and
    ``{"float": "-inf"}``.
    """
    if isinstance(value, float) and not isfinite(value):
        return {"float": str(value)}
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value


def from_json(value: Any) -> Any:
    """Undo ``to_json`` (tuples come back as lists)."""
    if isinstance(value, dict):
        if value.keys() == {"float"}:
            return float(value["float"])
        return {key: from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [from_json(item) for item in value]
    return value
