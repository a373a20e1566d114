"""Importing the package is cheap, and its promises are kept."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points

import pytest

import nbl_compiler as nbl
from nbl_compiler.backend import nbl as backend


def test_the_import_loads_no_framework_and_no_device() -> None:
    code = """
import sys
import nbl_compiler
from nbl_compiler import Attention, Config, errors
heavy = [m for m in ("torch", "transformers", "datasets", "triton") if m in sys.modules]
assert not heavy, heavy
nbl_compiler.Plan
nbl_compiler.calibrate
import torch
assert "transformers" not in sys.modules
assert not torch.cuda.is_initialized()
assert "torch._inductor.compile_fx" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_entry_point_is_the_backend() -> None:
    (entry,) = entry_points(group="torch_dynamo_backends", name="nbl")
    assert entry.load() is backend


@pytest.mark.parametrize("name", nbl.__all__)
def test_every_public_name_exists_and_is_documented(name: str) -> None:
    value = getattr(nbl, name)
    assert value.__doc__


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="module 'nbl_compiler' has no attribute 'pland'"):
        nbl.pland  # noqa: B018
