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
TRIAL_TOLERANCE = 1e-3
# A failure must not spoil what follows.
SCENARIOS = (
    "nan", "no batches", "few", "planned", "shares", "whole text", "trials on own text", "mixed"
)  # fmt: skip


def share(rank: int, scenario: str) -> list[Tensor]:
    """What one process calibrates on."""
    batches = [text(8, 128, seed=seed) for seed in range(5)]
    if scenario == "no batches" and rank == 1:
        return []
    return batches[:3] if rank == 0 else batches[3:]


def whole_text() -> list[Tensor]:
    """The whole text: what comes last chooses sites, and is fitted on by no process."""
    return [text(8, 128, seed=seed) for seed in range(13)]


def both_kinds() -> nbl.Config:
    """Sites of both kinds, chosen by trials."""
    return nbl.Config(nbl.Attention(count=1, rank_by="loss"), nbl.FFN(count=1, keep=0.25))


def calibrate(rank: int, scenario: str) -> nbl.Plan:
    model = tiny()
    if scenario == "few":
        return nbl.calibrate(model, whole_text()[:1], config(), whole_text=True, progress=False)
    if scenario == "planned":
        return nbl.plan(model, whole_text(), nbl.Budget(max_loss=0.1), progress=False).plan
    if scenario == "mixed":
        return nbl.calibrate(
            model, whole_text(), config(count=1, mixed=True), whole_text=True, progress=False
        )
    if scenario == "whole text":
        return nbl.calibrate(model, whole_text(), both_kinds(), whole_text=True, progress=False)
    if scenario == "trials on own text":
        own = whole_text()[:7] if rank == 0 else whole_text()[7:]
        return nbl.calibrate(model, own, both_kinds(), progress=False)
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
    assert all(site.details["tokens"] == 5 * 8 * 128 for site in together.sites)
    assert all(a.details == b.details for a, b in zip(together.sites, alone.sites, strict=True))
    assert_same(together, alone)


def assert_same(together: nbl.Plan, alone: nbl.Plan) -> None:
    for site, other in zip(together.sites, alone.sites, strict=True):
        assert (site.name, site.decision, site.reason) == (other.name, other.decision, other.reason)
        for error in ("nmse", "holdout_nmse"):
            assert getattr(site, error) == pytest.approx(getattr(other, error), rel=NMSE_TOLERANCE)
        if site.kind == "attention":
            assert site.cca_bound == pytest.approx(other.cca_bound, rel=NMSE_TOLERANCE)
        for key, tensor in site.tensors.items():
            scale = float(other.tensors[key].abs().max())
            torch.testing.assert_close(
                tensor, other.tensors[key], rtol=0, atol=MAP_TOLERANCE * scale
            )


def test_a_text_that_all_processes_have_is_shared(results: Path) -> None:
    files = [results / f"whole text.{rank}" for rank in range(PROCESSES)]
    assert files[0].read_bytes() == files[1].read_bytes()
    together = nbl.Plan.load(files[0])
    alone = nbl.calibrate(tiny(), whole_text(), both_kinds(), progress=False)
    assert_same(together, alone)
    for site, other in zip(together.sites, alone.sites, strict=True):
        # The last 2,048 tokens are left to the trials, whichever process has them.
        assert site.details["tokens"] == other.details["tokens"] == 11 * 8 * 128
        # The same trials, up to maps that differ by rounding.
        for name in ("loss", "loss_at_least"):
            assert (name in site.details) == (name in other.details)
            if name in site.details:
                expected = pytest.approx(other.details[name], rel=TRIAL_TOLERANCE)
                assert site.details[name] == expected


def test_gates_are_fitted_on_what_all_processes_saw(results: Path) -> None:
    files = [results / f"mixed.{rank}" for rank in range(PROCESSES)]
    assert files[0].read_bytes() == files[1].read_bytes()
    together = nbl.Plan.load(files[0])
    alone = nbl.calibrate(tiny(), whole_text(), config(count=1, mixed=True), progress=False)
    for site, other in zip(together.sites, alone.sites, strict=True):
        assert (site.decision, site.reason) == (other.decision, other.reason)
        # L-BFGS goes on from sums in another order.
        assert site.holdout_nmse == pytest.approx(other.holdout_nmse, rel=1e-3)


def test_trials_on_different_texts_choose_the_same_sites(results: Path) -> None:
    files = [results / f"trials on own text.{rank}" for rank in range(PROCESSES)]
    assert files[0].read_bytes() == files[1].read_bytes()
    plan = nbl.Plan.load(files[0])
    assert [site.kind for site in plan.rewritten] == ["attention", "ffn"]
    costs = [site.details.get("loss", site.details.get("loss_at_least")) for site in plan.sites]
    assert all(cost > 0 for cost in costs)
    assert all("loss" in site.details for site in plan.rewritten)


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
        ("few", ["CalibrationError: the text has 1 batch(es) to fit on, for 2 processes"] * 2),
        ("planned", ["ConfigError: plan runs in one process"] * 2),
    ],
)
def test_a_failure_in_one_process_ends_all(
    results: Path, scenario: str, messages: list[str]
) -> None:
    for rank, message in enumerate(messages):
        assert (results / f"{scenario}.{rank}").read_text().startswith(message)
