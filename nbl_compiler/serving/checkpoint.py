"""A model's folder on disk: its configuration, its weights, and whether they are a plan's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from nbl_compiler.errors import ConfigError
from nbl_compiler.plans import Plan
from nbl_compiler.registry import check_weights
from nbl_compiler.serving.plan_weights import PlanWeights

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_OUTPUT_HEAD = "lm_head."


def find_folder(model: str) -> Path:
    """Return the folder of a packaged model, a path, or a hub id (downloaded on first use).

    Raises:
        ConfigError: if there is none.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from nbl_compiler.models import resolve

    found = resolve(model)
    if Path(found).is_dir():
        return Path(found)
    try:
        return Path(snapshot_download(found, ignore_patterns=["*.bin", "*.pth", "consolidated*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{model!r} is neither a folder nor a hub id: {reason}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """Return a model's ``config.json``.

    Raises:
        ConfigError: if there is none, or it is not JSON.
    """
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} holds no model: {error}") from error
    return config


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that transformers would read, in order.

    Raises:
        ConfigError: if there are none, or one of the index is missing.
    """
    if (folder / _INDEX).is_file():
        named = json.loads((folder / _INDEX).read_text())["weight_map"].values()
        files = [folder / name for name in sorted(set(named))]
    else:
        files = [folder / _SINGLE]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ConfigError(
            f"{folder} lacks {', '.join(missing)}; save the model as safetensors "
            "(model.save_pretrained(...))"
        )
    return files


def read_weights(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Return name and tensor of all that a safetensors file holds, one in memory at a time.

    Raises:
        ConfigError: if it is no whole safetensors file.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  no mapping
                yield name, opened.get_tensor(name)
    except SafetensorError as error:
        raise ConfigError(f"{file} is no whole safetensors file: {error}") from error


def check_checkpoint(files: list[Path], plan: Plan) -> None:
    """Raise unless the files hold the weights that the plan was calibrated on.

    Each weight must be one that the plan knows, and each matrix of a replaced site one of that very
    site. An output head may differ: no site reads it.

    Raises:
        PlanMismatchError: naming the first weight that is not.
    """
    weights = PlanWeights(plan)
    for file in files:
        for name, weight in read_weights(file):
            if name.startswith(_OUTPUT_HEAD):
                continue
            check_weights({name: weight}, plan, f"the weights in {file.parent}")
            site = weights.site_of(name)
            if site is not None and weight.ndim == 2:
                own = [plan.fingerprint[i] for i in site.details.get("weights", ())]
                check_weights({name: weight}, plan, site.name, own or None)
