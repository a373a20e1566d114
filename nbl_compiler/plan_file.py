"""Plans on disk: one safetensors file, a JSON header, never pickle."""

from __future__ import annotations

import json
import os
import tempfile
from os import PathLike, stat
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from nbl_compiler.errors import ConfigError, PlanFormatError
from nbl_compiler.fingerprint import Sketch
from nbl_compiler.plans import INPUT_STATISTICS, Plan, Site, from_json, to_json
from nbl_compiler.value_states import states_of

VERSION = 4
# What older releases wrote, and read: none knows mixed values, the second none of sketches of peaks
# either, the first no value states.
_WITHOUT_MIX, _WITHOUT_PEAKS, _WITHOUT_STATES = 3, 2, 1
_KEY = "nbl_plan"
# What reading a header that somebody edited may raise, whatever they wrote into it.
_DAMAGED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError)


def save_plan(plan: Plan, path: str | PathLike[str]) -> None:
    """Write the plan to a temporary name beside ``path`` and rename it."""
    write_atomically(path, to_bytes(plan))


def to_bytes(plan: Plan) -> bytes:
    """Return the content of the plan's file."""
    header = {"version": _version(plan), "digest": plan.digest, **plan.header()}
    tensors = {name: tensor.detach().contiguous() for name, tensor in plan.tensors().items()}
    metadata = {_KEY: json.dumps(to_json(header), allow_nan=False)}
    return safetensors.torch.save(tensors, metadata=metadata)


def _version(plan: Plan) -> int:
    """Return the least version that holds all of the plan."""
    read = [states_of(site.details) for site in plan.rewritten]
    if any(states.mixed for states in read):
        return VERSION
    if any(sketch.peaks is not None for sketch in plan.fingerprint):
        return _WITHOUT_MIX
    states = any(read)
    return _WITHOUT_PEAKS if states else _WITHOUT_STATES


def write_atomically(path: str | PathLike[str], data: bytes) -> None:
    """Write a file whole or not at all."""
    target = Path(path)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~own_umask())
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def own_umask() -> int:
    """Return the process's umask, for files that were made with tighter modes than usual."""
    umask = os.umask(0)
    os.umask(umask)
    return umask


def load_plan(path: str | PathLike[str]) -> Plan:
    """Read a plan and check its version and digest (see ``Plan.load``)."""
    target = Path(path)
    if not target.is_file():
        raise FileNotFoundError(
            f"no plan at {target}; write one with plan.save(...) or `nbl calibrate`"
        )
    return from_bytes(target.read_bytes(), str(target))


def from_bytes(data: bytes, path: str = "a plan in memory") -> Plan:
    """Return the plan of a file's content.

    Args:
        data: What ``to_bytes`` returned.
        path: Where the data came from, for error messages.

    Raises:
        PlanFormatError: if the data is truncated, edited, or of an unknown version.
    """
    try:
        tensors = safetensors.torch.load(data)
        metadata = _metadata(data)
    except (SafetensorError, *_DAMAGED) as error:
        raise PlanFormatError(
            f"{path} is not a whole safetensors file ({error}); calibrate again or restore it"
        ) from error
    if _KEY not in metadata:
        raise PlanFormatError(f"{path} holds no nbl plan; is it a model's weight file?")
    return _checked(metadata[_KEY], tensors, path)


def _metadata(data: bytes) -> dict[str, str]:
    """Return the metadata of a safetensors file: its JSON header follows 8 bytes of its length."""
    size = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    return dict(metadata)


def _checked(text: str, tensors: dict[str, Tensor], path: str) -> Plan:
    """Return the plan of a header and tensors, if they are as they were written."""
    try:
        header = from_json(json.loads(text))
        version = header["version"]
    except _DAMAGED as error:
        raise PlanFormatError(f"the header of {path} is damaged; calibrate again") from error
    if version not in (_WITHOUT_STATES, _WITHOUT_PEAKS, _WITHOUT_MIX, VERSION):
        raise PlanFormatError(
            f"{path} is a plan of version {version}; this release reads versions up to {VERSION}: "
            "calibrate again, or use the release that wrote it"
        )
    try:
        plan = _build(header, tensors)
        intact = plan.digest == header["digest"] and plan.tensors().keys() == tensors.keys()
    except _DAMAGED as error:
        raise PlanFormatError(
            f"the header of {path} is damaged ({error}); calibrate again"
        ) from error
    if not intact:
        raise PlanFormatError(f"{path} was edited after it was written; calibrate again")
    return plan


def _build(header: dict[str, Any], tensors: dict[str, Tensor]) -> Plan:
    own: dict[str, dict[str, Tensor]] = {}
    inputs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        site, key = name.rsplit("/", 1)
        (inputs if key in INPUT_STATISTICS else own).setdefault(site, {})[key] = tensor
    sites = tuple(
        Site(**item, tensors=own.get(item["name"], {}), inputs=inputs.get(item["name"], {}))
        for item in header["sites"]
    )
    fingerprint = tuple(map(Sketch.of_header, header["fingerprint"]))
    return Plan(sites, fingerprint, header["model"], header["config"])


_Stamp = tuple[str, int, int, int]
_shared: WeakValueDictionary[_Stamp, Plan] = WeakValueDictionary()


def load_shared(path: str) -> Plan:
    """Load a plan, or return the one already loaded from the unchanged file.

    All graphs of a model share one plan's tensors that way; they are freed with the last graph.

    Raises:
        ConfigError: if the file cannot be read.
        PlanFormatError: if it is not a whole plan.
    """
    try:
        status = stat(path)
        stamp = (os.path.abspath(path), status.st_ino, status.st_mtime_ns, status.st_size)
        plan = _shared.get(stamp)
        if plan is None:
            plan = _shared[stamp] = load_plan(path)
    except OSError as error:
        raise ConfigError(
            f"cannot read a plan at {path} ({error.strerror or error}); write one with "
            "plan.save(...)"
        ) from error
    return plan
