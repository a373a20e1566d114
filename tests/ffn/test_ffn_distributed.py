"""FFN calibration in two processes gives one plan, the single process's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.ffn_calibrating import assert_same_plan, grid_model, on_a_grid
from helpers.own_ffn import ffn_config, rows
from helpers.processes import PROCESSES, calibrate_in_processes
from torch import Tensor

import nbl_compiler as nbl

# Float32 rounding of products that were cut into other blocks, times the condition of the fit.
TOLERANCE = 1e-4
FORMS: dict[str, tuple[bool, dict[str, Any]]] = {
    "kept, gated": (True, {"keep": 0.25}),
    "predicted, gated": (True, {"keep": 0.25, "guard": "predicted", "capacity": 0.3}),
    "exact": (False, {"keep": 0.25, "guard": "exact", "predictor": "quantized_8"}),
}
# A failure must not spoil what follows.
SCENARIOS = ("nan", "no batches", "too few", *FORMS)


def share(rank: int, scenario: str) -> list[Tensor]:
    """What one process calibrates on: three batches, or two, further from the origin."""
    batches = [on_a_grid(rows(seed=seed) + (0.5 if seed > 2 else 0.0)) for seed in range(5)]
    if scenario == "no batches" and rank == 1:
        return []
    if scenario == "too few":
        return [batches[0][:1, : 7 + rank]]
    own = batches[:3] if rank == 0 else batches[3:]
    if scenario == "nan" and rank == 1:
        own[-1][2, 3, 4] = float("nan")
    return own


def calibrate(scenario: str, batches: list[Tensor]) -> nbl.Plan:
    gated, options = FORMS.get(scenario, (False, {"guard": "exact"}))
    config = ffn_config(holdout=0.0 if scenario == "too few" else 0.2, **options)
    return nbl.calibrate(grid_model(gated), batches, config, progress=False)


def calibrate_share(rank: int, scenario: str) -> nbl.Plan:
    return calibrate(scenario, share(rank, scenario))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what the processes left."""
    folder = tmp_path_factory.mktemp("distributed_ffn")
    calibrate_in_processes(calibrate_share, SCENARIOS, folder)
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_two_processes_give_the_plan_of_one(results: Path, form: str) -> None:
    files = [results / f"{form}.{rank}" for rank in range(PROCESSES)]
    assert files[0].read_bytes() == files[1].read_bytes()
    together = nbl.Plan.load(files[0])
    shares = [share(rank, form) for rank in range(PROCESSES)]
    assert_same_plan(together, calibrate(form, [*shares[0], *shares[1]]), TOLERANCE)
    (site,) = together.rewritten
    assert site.details["tokens"] == 5 * 8 * 64
    for own in shares:  # neither process alone would have found it
        (other,) = calibrate(form, own).rewritten
        key = "weight" if form != "exact" else "low"
        difference = (site.tensors[key] - other.tensors[key]).abs().max()
        assert difference > 10 * TOLERANCE * site.tensors[key].abs().max()


@pytest.mark.parametrize(
    ("scenario", "messages"),
    [
        (
            "nan",
            [
                "CalibrationError: process 1 failed: layers.0: NaN or infinite ",
                "CalibrationError: layers.0: NaN or infinite ",
            ],
        ),
        ("no batches", ["CalibrationError: the processes saw different sites (1, 0)"] * 2),
        ("too few", ["CalibrationError: layers.0 saw 15 calibration tokens; give at least 16"] * 2),
    ],
)
def test_a_failure_in_one_process_ends_all(
    results: Path, scenario: str, messages: list[str]
) -> None:
    for rank, message in enumerate(messages):
        assert (results / f"{scenario}.{rank}").read_text().startswith(message)
