"""Every example runs, on a tiny model where it takes one."""

from __future__ import annotations

import runpy
from contextlib import chdir, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import pytest
from helpers.saved_model import save_tiny_llama

EXAMPLES = Path(__file__).parents[1] / "examples"
EAGER = ("--lowering", "eager")
SMALL = ("--tokens", "2048", "--length", "64", *EAGER)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


def run(script: str, *words: str, folder: Path) -> str:
    """Run an example in an empty folder and return what it printed.

    In this process: importing everything anew takes longer than most of the examples.
    """
    with chdir(folder), redirect_stdout(StringIO()) as told, patch("sys.argv", [script, *words]):
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    return told.getvalue()


def test_quickstart(folder: Path, tmp_path: Path) -> None:
    told = run("quickstart.py", "--model", str(folder), *SMALL, folder=tmp_path)
    assert "2 of 4 sites rewritten" in told
    assert "dense: perplexity" in told
    assert "linearized: perplexity" in told
    assert (tmp_path / "plan.safetensors").is_file()


def test_generate_static_cache(folder: Path, tmp_path: Path) -> None:
    words = ("--model", str(folder), "--prompt", "def f", *SMALL)
    told = run("generate_static_cache.py", *words, folder=tmp_path)
    assert "KV cache: " in told


def test_embed(tmp_path: Path) -> None:
    told = run("embed.py", "--texts", "16", "--length", "64", *EAGER, folder=tmp_path)
    assert "6 of 6 sites rewritten" in told
    assert 0.5 < float(told.split("mean ")[1].split(",")[0]) <= 1


def test_inspect_rejected(tmp_path: Path) -> None:
    told = run("inspect_rejected.py", folder=tmp_path)
    assert told.count("why:   cross-attention") == 2
    assert "modeling_t5.py" in told


def test_own_pass(tmp_path: Path) -> None:
    told = run("own_pass.py", folder=tmp_path)
    assert "drop_inactive_dropout: ('5 dropouts gone',)" in told
    assert "same logits: True" in told


def test_every_example_has_a_test() -> None:
    tested = {name for name in globals() if name.startswith("test_")}
    assert {f"test_{path.stem}" for path in EXAMPLES.glob("*.py")} <= tested
