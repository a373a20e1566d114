"""Plans on disk: one safetensors file, a JSON header, never pickle."""

from __future__ import annotations

import json
import os
import tempfile
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from nbl_compiler.errors import PlanFormatError
from nbl_compiler.fingerprint import Sketch
from nbl_compiler.plan import Plan, Site

VERSION = 1
_KEY = "nbl_plan"


def save_plan(plan: Plan, path: str | PathLike[str]) -> None:
    """Write the plan to a temporary name beside ``path`` and rename it."""
    header = {"version": VERSION, "digest": plan.digest, **plan.header()}
    tensors = {name: tensor.contiguous() for name, tensor in plan.tensors().items()}
    write_atomically(path, save(tensors, metadata={_KEY: json.dumps(header)}))


def write_atomically(path: str | PathLike[str], data: bytes) -> None:
    """Write a file whole or not at all."""
    target = Path(path)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load_plan(path: str | PathLike[str]) -> Plan:
    """Read a plan and check its version and digest (see ``Plan.load``)."""
    target = Path(path)
    if not target.is_file():
        raise FileNotFoundError(f"no plan at {target}; write one with plan.save(...) or `nbl calibrate`")
    try:
        with safe_open(target, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise PlanFormatError(
            f"{target} is not a whole safetensors file ({error}); calibrate again or restore it"
        ) from error
    if _KEY not in metadata:
        raise PlanFormatError(f"{target} holds no nbl plan; is it a model's weight file?")
    try:
        header = json.loads(metadata[_KEY])
        version = header["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise PlanFormatError(f"the header of {target} is damaged; calibrate again") from error
    if version != VERSION:
        raise PlanFormatError(
            f"{target} is a plan of version {version}; this release reads version {VERSION}: "
            "calibrate again, or use the release that wrote it"
        )
    plan = _build(header, tensors, target)
    if plan.digest != header.get("digest"):
        raise PlanFormatError(f"{target} was edited after it was written; calibrate again")
    return plan


def _build(header: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> Plan:
    try:
        own: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            site, key = name.rsplit("/", 1)
            own.setdefault(site, {})[key] = tensor
        sites = tuple(Site(**item, tensors=own.get(item["name"], {})) for item in header["sites"])
        fingerprint = tuple(
            Sketch(tuple(shape), dtype, norm, value)
            for shape, dtype, norm, value in header["fingerprint"]
        )
        return Plan(sites, fingerprint, header["model"], header["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise PlanFormatError(f"the header of {path} is damaged ({error}); calibrate again") from error
