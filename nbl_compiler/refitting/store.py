"""What lies between two pieces of a run: on disk, so that memory holds one batch at a time.

    <folder>/run.json             which run this is, and how many sites are done
    <folder>/plan.safetensors     the plan so far
    <folder>/after-003/7.pt       values of batch 7 behind the third site, both routes

A piece writes a folder of its own and ``run.json`` last, so an interrupted run goes on from the
last site that was finished.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nbl_compiler.errors import ConfigError
from nbl_compiler.plan_file import write_atomically
from nbl_compiler.plans import Plan
from nbl_compiler.refitting.route import Values

_RUN, _PLAN = "run.json", "plan.safetensors"


class Store:
    """A folder with the state of one refit.

    Args:
        folder: The folder; made if it does not exist.
        key: What the run depends on (plan, text, options), as a digest.

    Raises:
        ConfigError: if the folder holds anything but this run.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._folder, self._key = folder, key
        folder.mkdir(parents=True, exist_ok=True)
        self._state = self._known()

    def _known(self) -> dict[str, Any]:
        file = self._folder / _RUN
        if not file.exists():
            if any(self._folder.iterdir()):
                raise ConfigError(f"{self._folder} is not empty and holds no refit; give another")
            return {"key": self._key, "done": 0, "facts": {}}
        state: dict[str, Any] = json.loads(file.read_text())
        if state["key"] != self._key:
            raise ConfigError(
                f"{self._folder} holds a refit of another plan, text or options; give another "
                "folder, or delete this one"
            )
        return state

    @property
    def done(self) -> int:
        """How many sites are finished."""
        return int(self._state["done"])

    @property
    def facts(self) -> dict[str, Any]:
        """What was noted with the last site."""
        return dict(self._state["facts"])

    def plan(self, start: Plan) -> Plan:
        """Return the plan so far: ``start`` before any site is finished."""
        return Plan.load(self._folder / _PLAN) if self.done else start

    def finish_site(self, plan: Plan, facts: Mapping[str, Any]) -> None:
        """Note that one more site is finished: what was saved for it counts from now on."""
        plan.save(self._folder / _PLAN)
        self._state = {"key": self._key, "done": self.done + 1, "facts": dict(facts)}
        write_atomically(self._folder / _RUN, json.dumps(self._state).encode())
        for old in range(self.done):
            shutil.rmtree(self._after(old), ignore_errors=True)

    def save(self, batch: int, routes: tuple[Values, Values], inputs: Values) -> None:
        """Keep a batch's values in front of the next piece."""
        folder = self._after(self.done + 1)
        folder.mkdir(exist_ok=True)
        owners = {
            value.untyped_storage().data_ptr(): name
            for name, value in inputs.items()
            if isinstance(value, Tensor)
        }
        packed = [{name: _pack(v, owners) for name, v in values.items()} for values in routes]
        torch.save(packed, folder / f"{batch}.pt")

    def load(self, batch: int, inputs: Values) -> tuple[Values, Values]:
        """Return a batch's values behind the last finished site."""
        if self.done == 0:
            return {}, {}
        path = self._after(self.done) / f"{batch}.pt"
        packed = torch.load(path, weights_only=True)
        dense, compressed = (
            {name: _unpack(v, inputs) for name, v in values.items()} for values in packed
        )
        return dense, compressed

    def clear(self) -> None:
        """Delete what the run kept, and the folder if nothing else is in it."""
        for number in range(self.done + 2):
            shutil.rmtree(self._after(number), ignore_errors=True)
        for name in (_RUN, _PLAN):
            (self._folder / name).unlink(missing_ok=True)
        if not any(self._folder.iterdir()):
            self._folder.rmdir()

    def _after(self, number: int) -> Path:
        return self._folder / f"after-{number:03}"


def _pack(value: Any, owners: Mapping[int, str]) -> Any:
    """Return a value as it is stored: views of the graph's inputs by what they look at."""
    if isinstance(value, list | tuple):
        return type(value)(_pack(item, owners) for item in value)
    if not isinstance(value, Tensor):
        return value
    owner = owners.get(value.untyped_storage().data_ptr())
    if owner is None:
        return value
    return {
        "input": owner,
        "view": (tuple(value.shape), value.stride(), value.storage_offset()),
    }


def _unpack(value: Any, inputs: Values) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_unpack(item, inputs) for item in value)
    if isinstance(value, dict):
        return inputs[value["input"]].as_strided(*value["view"])
    return value
