"""Taking part in a job that ``torchrun`` started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from nbl_compiler.errors import ConfigError, NBLError


def processes() -> int:
    """Return how many processes ``torchrun`` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def own_rank() -> int:
    """Return this process's number in the job; 0 without one."""
    return int(os.environ.get("RANK", "0")) if processes() > 1 else 0


def refuse_job(command: str) -> None:
    """Raise if ``torchrun`` started several processes for a command that runs in one.

    Raises:
        ConfigError: if so.
    """
    if processes() > 1:
        error = ConfigError(f"nbl {command} runs in one process; start it without torchrun")
        error.told_by = 0
        raise error


@contextmanager
def job(device: str) -> Iterator[str]:
    """Join the job, if there is one, and leave it at the end; yield the device to work on.

    Args:
        device: As the user gave it. Of ``cuda``, every process takes its own GPU.

    Raises:
        ConfigError: if all processes were given one GPU, or the machine has too few.
    """
    if processes() == 1:
        yield device
        return
    import torch
    import torch.distributed as dist

    if device.startswith("cuda"):
        device = _own_gpu(device)
        dist.init_process_group("nccl", device_id=torch.device(device))
    else:
        dist.init_process_group("gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _own_gpu(device: str) -> str:
    import torch

    local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if device != "cuda":
        raise ConfigError(f"--device {device} is one GPU for all processes; give --device cuda")
    if local >= count:
        raise ConfigError(
            f"this machine has {count} GPU(s); start as many processes (--nproc-per-node {count})"
        )
    torch.cuda.set_device(local)
    return f"cuda:{local}"


@contextmanager
def together() -> Iterator[None]:
    """Let an error of one process, raised in here, end all of them."""
    from nbl_compiler.distributed import fail_together

    error = None
    try:
        yield
    except NBLError as failure:
        error = failure
    fail_together(error)
