"""A model's weights with a plan put in: from what a checkpoint holds to what the layers read.

    layers.i.self_attn.*                    dropped; layers.i.self_attn.map.{weight, bias} come in
    layers.i.input_layernorm.weight         dropped where the map reads the residual stream
    layers.i.mlp.{gate_proj, up_proj}.*     [f, …] → the rows of the kept neurons [k, …]
    layers.i.mlp.down_proj.*                dropped; the plan's own columns [d, k] come in
                                            layers.i.mlp.map.weight [d, d] and layers.i.mlp.bias [d]

An FFN with a guard keeps all of its weights; what the plan has of it does not come in as weights.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator

import torch
from torch import Tensor

from nbl_compiler.errors import PlanMismatchError
from nbl_compiler.plans import Plan, Site
from nbl_compiler.serving.families import layer_of, place_of

_ROWS = ("gate_proj.", "up_proj.")
MAP = "map"
"""Name of the linear map within a layer's attention or FFN."""


class PlanWeights:
    """What a plan makes of a checkpoint's weights.

    Args:
        plan: The plan.
        layers: The layers that are wanted of it; all by default.
    """

    def __init__(self, plan: Plan, layers: Container[int] | None = None) -> None:
        placed = [(layer_of(site), site) for site in plan.rewritten]
        wanted = [(i, s) for i, s in placed if i is not None and (layers is None or i in layers)]
        self.attention: dict[int, Site] = {i: s for i, s in wanted if s.kind == "attention"}
        self.ffn: dict[int, Site] = {i: s for i, s in wanted if s.kind == "ffn"}
        self._seen: set[str] = set()

    def _folded(self) -> list[tuple[int, Site]]:
        return [(layer, site) for layer, site in self.ffn.items() if not site.guarded]

    def site_of(self, name: str) -> Site | None:
        """Return the replaced site that one of the checkpoint's weights belongs to."""
        place = place_of(name)
        if place is None:
            return None
        return {"self_attn": self.attention, "mlp": self.ffn}.get(place[1], {}).get(place[0])

    def original(self, name: str, weight: Tensor) -> Tensor | None:
        """Return what is read of one of the checkpoint's weights, or None if nothing is.

        Raises:
            PlanMismatchError: if an FFN has another number of neurons than the plan says.
        """
        place, site = place_of(name), self.site_of(name)
        if place is None:
            return weight
        layer, part, rest = place
        if part == "input_layernorm" and layer in self.attention:
            return None if reads_residual(self.attention[layer]) else weight
        if site is None or site.guarded:
            return weight
        kept = site.kind == "ffn" and rest.startswith(_ROWS)
        return _kept_rows(name, weight, site) if kept else None

    def replacements(self, multiple_of: int = 1) -> Iterator[tuple[str, Tensor]]:
        """Return what the plan brings in, under the names of vLLM's modules.

        Args:
            multiple_of: Kept neurons are padded with zeros to a multiple of this.
        """
        for layer, site in self.attention.items():
            for name in ("weight", "bias"):
                yield f"model.layers.{layer}.self_attn.{MAP}.{name}", site.tensors[name]
        for layer, site in self._folded():
            names = {"weight": f"{MAP}.weight", "bias": "bias", "down": "down_proj.weight"}
            for name, target in names.items():
                if name not in site.tensors:
                    continue
                tensor = site.tensors[name]
                if name == "down":
                    tensor = pad(tensor.T, multiple_of).T
                yield f"model.layers.{layer}.mlp.{target}", tensor

    def through(
        self, weights: Iterable[tuple[str, Tensor]], multiple_of: int = 1
    ) -> Iterator[tuple[str, Tensor]]:
        """Return all that the layers read: from the checkpoint, then from the plan."""
        for name, weight in weights:
            read = self.original(name, weight)
            if read is None:
                continue
            site = self.site_of(name)
            if site is not None:
                self._seen.add(name)
                read = read if site.guarded else pad(read, multiple_of)
            yield name, read
        yield from self.replacements(multiple_of)

    def missing(self) -> list[str]:
        """Return the names of FFN weights that are needed, and that ``through`` never met."""
        wanted = []
        for layer, site in self.ffn.items():
            parts = (*_ROWS, "down_proj.") if site.guarded else _ROWS
            if site.guarded or int(site.details["kept"]):
                wanted += [f"model.layers.{layer}.mlp.{part}weight" for part in parts]
        return [name for name in wanted if name not in self._seen]


def reads_residual(site: Site) -> bool:
    """Tell whether an attention's map reads the residual stream in front of the norm."""
    return site.details.get("input") == "residual"


def padded_count(kept: int, multiple_of: int) -> int:
    """Return a number of kept neurons, rounded up to a multiple."""
    return -(-kept // multiple_of) * multiple_of


def pad(rows: Tensor, multiple_of: int) -> Tensor:
    """Add rows of zeros to [n, …] until n is a multiple."""
    missing = padded_count(rows.shape[0], multiple_of) - rows.shape[0]
    return rows if missing == 0 else torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])


def _kept_rows(name: str, weight: Tensor, site: Site) -> Tensor | None:
    """Return the rows [k, …] of a weight [f, …], which a stripped folder has already cut down."""
    kept, neurons = int(site.details["kept"]), int(site.details["neurons"])
    if kept == 0:
        return None
    if weight.shape[0] not in (neurons, kept):
        raise PlanMismatchError(
            f"{name} has {weight.shape[0]} rows; the plan's {site.name} has {neurons} neurons, "
            f"{kept} of them kept"
        )
    if weight.shape[0] == kept:
        return weight
    return weight.index_select(0, site.tensors["kept"].to(weight.device))
