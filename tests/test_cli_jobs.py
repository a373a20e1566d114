"""``nbl calibrate`` in a job that ``torchrun`` starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.saved_model import save_tiny_llama

from nbl_compiler import Plan, cli

# Float32 rounding of products that were cut into other blocks, times the condition of the fit.
NMSE_TOLERANCE = 1e-4
LAUNCHER = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


def start(launcher: tuple[str, ...], *words: object) -> subprocess.CompletedProcess[str]:
    command = [*launcher, "-m", "nbl_compiler", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.thorough  # tests/test_distributed.py does the same by the API every day
def test_two_processes_write_the_plan_of_one(folder: Path, tmp_path: Path) -> None:
    words = ("--tokens", 4096, "--length", 128, "--count", 2)
    plans = {}
    for name, launcher in (("together", LAUNCHER), ("alone", (sys.executable,))):
        path = tmp_path / f"{name}.safetensors"
        ended = start(launcher, "calibrate", folder, path, *words)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.count("written to") == 1  # one process speaks
        assert ended.stderr.count("calibrating:   0%") == 1  # a bar may be drawn at its end twice
        plans[name] = Plan.load(path)
    assert len(plans["together"].rewritten) == 2
    for site, other in zip(plans["together"].sites, plans["alone"].sites, strict=True):
        assert (site.name, site.decision, site.reason) == (other.name, other.decision, other.reason)
        assert site.details["tokens"] == other.details["tokens"] == 4096
        assert site.holdout_nmse == pytest.approx(other.holdout_nmse, rel=NMSE_TOLERANCE)


def test_a_mistake_is_told_once_and_ends_all(folder: Path, tmp_path: Path) -> None:
    missing = tmp_path / "no folder"
    ended = start(LAUNCHER, "calibrate", folder, missing / "plan.safetensors", "--quiet")
    assert ended.returncode == 1
    told = [line for line in ended.stderr.splitlines() if line.startswith("nbl: ")]
    assert told == [f"nbl: the folder {missing} does not exist"]


@pytest.mark.parametrize(
    ("rank", "words", "message"),
    [
        (0, ("plan", "m", "p", "--max-loss", "2%"), "nbl: nbl plan runs in one process; start it "),
        (1, ("plan", "m", "p", "--max-loss", "2%"), ""),
        (0, ("refit", "m", "p", "q"), "nbl: nbl refit runs in one process; start it without"),
    ],
)
def test_other_commands_refuse_to_run_several_times(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rank: int,
    words: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(sys, "argv", ["nbl", *words])
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    told = capsys.readouterr().err
    assert told.startswith(message)
    assert bool(told) == bool(message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tensor-parallel",), "--tensor-parallel spreads a model over processes; start them by"),
        (("--tensor-parallel", "--device-map", "auto"), "are two ways; give one of them"),
    ],
)
def test_a_model_is_spread_in_one_way(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    tmp_path: Path,
    words: tuple[str, ...],
    message: str,
) -> None:
    path = tmp_path / "plan.safetensors"
    monkeypatch.setattr(sys, "argv", ["nbl", "calibrate", str(folder), str(path), *words])
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    assert message in capsys.readouterr().err
    assert not path.exists()
