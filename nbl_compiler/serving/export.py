"""``nbl export``: a model and its plan as one folder that vLLM serves.

    OUT/config.json              ``architectures`` renamed, a section ``nbl``: the plan's digest
    OUT/weights-….safetensors    the original files, linked or copied
    OUT/nbl/plan.safetensors     the plan
    OUT/tokenizer.json …         all that is no weight, copied

The weights' names are not those that transformers looks for: without the plugin nobody can take the
folder for the dense model, nor fill what ``strip`` left out with random numbers.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors.torch

from nbl_compiler.errors import ConfigError
from nbl_compiler.plan_file import own_umask
from nbl_compiler.plans import Plan
from nbl_compiler.serving.checkpoint import (
    check_checkpoint,
    find_folder,
    read_config,
    read_weights,
    weight_files,
)
from nbl_compiler.serving.families import PLAN_FILE, SECTION, served_name
from nbl_compiler.serving.plan_weights import PlanWeights
from nbl_compiler.serving.refusals import check_servable

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
# config.json is written anew; by params.json vLLM would take the folder for Mistral's own format.
_LEFT_OUT = ("config.json", "params.json")
_VERSION = 1


@dataclass(frozen=True)
class Exported:
    """What ``export`` wrote.

    Args:
        folder: Where.
        architecture: What ``config.json`` names.
        digest: The plan's.
        linked: How many files of weights are hard links to the original ones.
        weight_bytes: Bytes of all weights.
        left_out: Bytes of weights that ``strip`` left out.
    """

    folder: Path
    architecture: str
    digest: str
    linked: int
    weight_bytes: int
    left_out: int

    def __str__(self) -> str:
        text = f"{self.folder}: {self.architecture}, {self.weight_bytes:,} bytes of weights"
        how = f" in {self.linked} linked files" if self.linked else ""
        gone = f", {self.left_out:,} bytes left out" if self.left_out else ""
        return f"{text}{how}{gone}"


def export(
    model: str | PathLike[str],
    plan: Plan,
    folder: str | PathLike[str],
    *,
    strip: bool = False,
    copy: bool = False,
) -> Exported:
    """Write a folder that vLLM serves (with this package installed), whole or not at all.

    Args:
        model: A folder, a hub id, or a packaged model's name; its weights as safetensors.
        plan: A plan that was calibrated on these weights.
        folder: The folder to make.
        strip: Leave out weights that no layer reads any more, which copies the others.
        copy: Copy the weights. Otherwise they are hard links where the file system allows it, and
            what is written over the original files in place shows here as well.

    Raises:
        ConfigError: if the folder exists, or the model or plan cannot be served; with the reason.
        PlanMismatchError: if the plan was calibrated on other weights.
    """
    target = Path(folder)
    if target.exists():
        raise ConfigError(f"{target} exists already; name a new folder")
    if not target.parent.is_dir():
        raise ConfigError(f"the folder {target.parent} does not exist")
    source = find_folder(os.fspath(model))
    config = read_config(source)
    if SECTION in config:
        raise ConfigError(f"{source} was exported already; give the model that it was made of")
    check_servable(config, plan)
    files = weight_files(source)
    check_checkpoint(files, plan)

    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{target.name}."))
    try:
        result = _fill(scratch, target, source, files, config, plan, strip=strip, copy=copy)
        os.chmod(scratch, 0o777 & ~own_umask())
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return result


def _fill(
    scratch: Path,
    target: Path,
    source: Path,
    files: list[Path],
    config: dict[str, Any],
    plan: Plan,
    *,
    strip: bool,
    copy: bool,
) -> Exported:
    for file in source.iterdir():
        wanted = file.is_file() and file.name not in _LEFT_OUT
        if wanted and not file.name.endswith((*_WEIGHTS, ".index.json")):
            shutil.copyfile(file, scratch / file.name)
    linked = written = 0
    for number, file in enumerate(files, 1):
        name = scratch / f"weights-{number:05}-of-{len(files):05}.safetensors"
        if strip:
            _write_read_weights(file, name, plan)
        else:
            linked += _link_or_copy(file, name, copy=copy)
        written += name.stat().st_size if name.exists() else 0
    (scratch / PLAN_FILE).parent.mkdir()
    plan.save(scratch / PLAN_FILE)
    architecture = served_name(config["architectures"][0])
    section = {"version": _VERSION, "digest": plan.digest, "stripped": strip}
    changed = {**config, "architectures": [architecture], SECTION: section}
    (scratch / "config.json").write_text(json.dumps(changed, indent=2) + "\n")
    before = sum(file.stat().st_size for file in files)
    return Exported(target, architecture, plan.digest, linked, written, max(before - written, 0))


def _link_or_copy(file: Path, target: Path, *, copy: bool) -> bool:
    """Make ``target`` a hard link to a file, or a copy; tell whether it is a link."""
    if not copy:
        try:
            os.link(file.resolve(), target)
        except OSError:  # another file system, or one without links
            pass
        else:
            return True
    shutil.copyfile(file, target)
    return False


def _write_read_weights(file: Path, target: Path, plan: Plan) -> None:
    """Write a file of weights without what no layer reads; none, if nothing is left."""
    weights = PlanWeights(plan)
    read = {name: weights.original(name, weight) for name, weight in read_weights(file)}
    left = {name: weight.contiguous() for name, weight in read.items() if weight is not None}
    if left:
        safetensors.torch.save_file(left, target, metadata={"format": "pt"})
        os.chmod(target, 0o666 & ~own_umask())  # safetensors lets nobody else read it
