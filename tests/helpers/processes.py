"""Calibrating in several processes of a ``torch.distributed`` job (gloo)."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nbl_compiler.errors import NBLError
from nbl_compiler.plans import Plan

PROCESSES = 2

Calibrate = Callable[[int, str], Plan]


def calibrate_in_processes(calibrate: Calibrate, scenarios: Sequence[str], folder: Path) -> None:
    """Run every scenario in a job; each process leaves its plan or error in ``scenario.rank``.

    Args:
        calibrate: A function of a module: (rank, scenario) → plan.
        scenarios: In this order, in the same processes.
        folder: Where the files go.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_worker, (port, calibrate, tuple(scenarios), str(folder)), nprocs=PROCESSES)


def _worker(
    rank: int, port: int, calibrate: Calibrate, scenarios: Sequence[str], folder: str
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(minutes=2),
    )
    for scenario in scenarios:
        path = Path(folder) / f"{scenario}.{rank}"
        try:
            calibrate(rank, scenario).save(path)
        except NBLError as error:
            path.write_text(f"{type(error).__name__}: {error}")
    dist.destroy_process_group()
