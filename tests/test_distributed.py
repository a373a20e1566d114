"""Calibration in two processes gives one plan, the single process's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.processes import PROCESSES, calibrate_in_processes
from helpers.tiny import config, text, tiny
from torch import Tensor

import nbl_compiler as nbl

# Float32 rounding of products that were cut into other blocks, times the condition of the fit.
MAP_TOLERANCE = 1e-3
NMSE_TOLERANCE = 1e-4
SCENARIOS = ("nan", "no batches", "shares")  # a failure must not spoil what follows


def share(rank: int, scenario: str) -> list[Tensor]:
    """What one process calibrates on."""
    batches = [text(8, 128, seed=seed) for seed in range(5)]
    if scenario == "no batches" and rank == 1:
        return []
    return batches[:3] if rank == 0 else batches[3:]


def calibrate(rank: int, scenario: str) -> nbl.Plan:
    model = tiny()
    if scenario == "nan" and rank == 1:
        with torch.no_grad():
            model.model.layers[1].self_attn.o_proj.weight[0, 0] = float("nan")
    return nbl.calibrate(model, share(rank, scenario), config(count=1), progress=False)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what the processes left."""
    folder = tmp_path_factory.mktemp("distributed")
    calibrate_in_processes(calibrate, SCENARIOS, folder)
    return folder


def test_two_processes_give_the_plan_of_one(results: Path) -> None:
    files = [results / f"shares.{rank}" for rank in range(PROCESSES)]
    assert files[0].read_bytes() == files[1].read_bytes()
    together = nbl.Plan.load(files[0])
    batches = [batch for rank in range(PROCESSES) for batch in share(rank, "shares")]
    alone = nbl.calibrate(tiny(), batches, config(count=1), progress=False)
    assert together.fingerprint == alone.fingerprint
    for site, other in zip(together.sites, alone.sites, strict=True):
        assert (site.name, site.decision, site.reason) == (other.name, other.decision, other.reason)
        assert site.details == other.details
        assert site.details["tokens"] == 5 * 8 * 128
        for error in ("nmse", "holdout_nmse"):
            assert getattr(site, error) == pytest.approx(getattr(other, error), rel=NMSE_TOLERANCE)
        assert site.cca_bound == pytest.approx(other.cca_bound, rel=NMSE_TOLERANCE)
        for key, tensor in site.tensors.items():
            scale = float(other.tensors[key].abs().max())
            torch.testing.assert_close(
                tensor, other.tensors[key], rtol=0, atol=MAP_TOLERANCE * scale
            )


@pytest.mark.parametrize(
    ("scenario", "messages"),
    [
        (
            "nan",
            [
                "CalibrationError: process 1 failed: model.layers.1.self_attn: activations hold",
                "CalibrationError: model.layers.1.self_attn: activations hold NaN or infinity",
            ],
        ),
        ("no batches", ["CalibrationError: the processes saw different sites (2, 0)"] * 2),
    ],
)
def test_a_failure_in_one_process_ends_all(
    results: Path, scenario: str, messages: list[str]
) -> None:
    for rank, message in enumerate(messages):
        assert (results / f"{scenario}.{rank}").read_text().startswith(message)
