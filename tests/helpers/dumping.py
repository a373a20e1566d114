"""Making graph dumps, and executing a dumped file as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import safetensors.torch
from helpers.plans import random_plan
from helpers.tiny import compiled, output, text
from models.architectures import BY_NAME, HIDDEN
from torch import Tensor, nn

import nbl_compiler as nbl


def plan_for(model: nn.Module, layers: int = 2) -> nbl.Plan:
    """Return a plan that replaces the last layer's attention by a random map."""
    return random_plan(model, BY_NAME["llama"].site_names(layers), [layers - 1], HIDDEN)


def dumped(
    root: Path, model: nn.Module, plan: nbl.Plan, *lengths: int, **options: object
) -> list[Path]:
    """Run the compiled model on texts of these lengths; return the folders of its graphs."""
    fast = compiled(model, plan=plan, dump_dir=root, **options)
    for length in lengths:
        output(fast, text(length=length))
    return graph_folders(root)


def graph_folders(root: Path) -> list[Path]:
    """Return the folders of the graphs below a dump folder, in order."""
    return sorted(root.glob("graph_*"))


def last_file(folder: Path) -> Path:
    """Return the graph after the last pass."""
    return max(folder.glob("*.after.py"))


def execute(file: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Execute a dumped file in a fresh interpreter, from another folder."""
    return subprocess.run(
        [sys.executable, str(file), *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=file.parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def outputs_of(file: Path, saved: Path) -> list[Tensor]:
    """Execute a dumped file and return what its graph returned."""
    done = execute(file, "--save", str(saved))
    assert done.returncode == 0, done.stderr
    found = safetensors.torch.load_file(saved)
    return [found[f"output_{index}"] for index in range(len(found))]
