"""The installed entry point, in the processes that vLLM starts itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Served, run_in_transformers
from test_serving import CASES, assert_same
from tiny_plans import make_model, random_plan, save

from nbl_compiler.serving.export import export

SCRIPT = Path(__file__).with_name("engines.py")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Served]:
    """A stripped folder of Llama and its plan, and what transformers makes of that plan."""
    folder = tmp_path_factory.mktemp("processes")
    model = make_model("Llama")
    plan = random_plan(model, **CASES["Llama"])
    export(save(model, folder / "model"), plan, folder / "out", strip=True)
    return folder / "out", run_in_transformers(model, plan)


def run(folder: Path, result: Path, settings: dict[str, Any], **environment: str) -> str:
    """Serve in a program of its own; return what it said."""
    variables = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **environment}
    words = [sys.executable, str(SCRIPT), str(folder), str(result), json.dumps(settings)]
    done = subprocess.run(words, capture_output=True, text=True, env=variables, check=False)
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="compiled"),
        pytest.param({"tensor_parallel_size": 2, "enforce_eager": True}, id="tensor parallel 2"),
    ],
)
def test_processes_of_its_own(
    settings: dict[str, Any], exported: tuple[Path, Served], tmp_path: Path
) -> None:
    folder, expected = exported
    said = run(folder, tmp_path / "result", settings)
    assert (tmp_path / "result").exists(), said
    assert_same(Served(**torch.load(tmp_path / "result")), expected)


def test_vllm_without_the_plugin_refuses(exported: tuple[Path, Served], tmp_path: Path) -> None:
    said = run(exported[0], tmp_path / "result", {}, VLLM_PLUGINS="none")
    assert not (tmp_path / "result").exists()
    assert "NBLLlamaForCausalLM" in said
    assert "not supported" in said
