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


def run(folder: Path, result: Path, settings: dict[str, Any], **environment: str) -> str:
    """Serve in a program of its own; return what it said."""
    variables = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **environment}
    words = [sys.executable, str(SCRIPT), str(folder), str(result), json.dumps(settings)]
    done = subprocess.run(words, capture_output=True, text=True, env=variables, check=False)
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("settings", "plan"),
    [
        pytest.param(
            {}, {"attention": (1,), "residual": (1,), "ffn": {0: 11}, "guarded": (2,)},
            id="compiled",
        ),
        pytest.param(
            {"tensor_parallel_size": 2, "enforce_eager": True}, CASES["Llama"],
            id="tensor parallel 2",
        ),
    ],
)  # fmt: skip
def test_processes_of_its_own(
    settings: dict[str, Any], plan: dict[str, Any], tmp_path: Path
) -> None:
    model = make_model("Llama")
    made = random_plan(model, **plan)
    expected = run_in_transformers(model, made)
    export(save(model, tmp_path / "model"), made, tmp_path / "out", strip=True)
    said = run(tmp_path / "out", tmp_path / "result", settings)
    assert (tmp_path / "result").exists(), said
    assert_same(Served(**torch.load(tmp_path / "result")), expected)


def test_vllm_without_the_plugin_refuses(tmp_path: Path) -> None:
    model = make_model("Llama")
    export(save(model, tmp_path / "model"), random_plan(model), tmp_path / "out")
    said = run(tmp_path / "out", tmp_path / "result", {}, VLLM_PLUGINS="none")
    assert not (tmp_path / "result").exists()
    assert "NBLLlamaForCausalLM" in said
    assert "not supported" in said
