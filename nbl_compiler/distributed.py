"""Calibration in several processes: moments are a commutative monoid, so merging is a sum."""

from __future__ import annotations

import torch
import torch.distributed as dist

from nbl_compiler.errors import CalibrationError, NBLError
from nbl_compiler.observe import Observation
from nbl_compiler.plan_file import from_bytes, to_bytes
from nbl_compiler.plans import Plan
from nbl_compiler.several_processes import all_sum, several_processes
from nbl_compiler.solvers.moments import Moments


def fail_together(error: NBLError | None) -> None:
    """Raise in every process if one of them failed, instead of leaving the others to wait.

    Raises:
        NBLError: this process's own error.
        CalibrationError: if another process failed, naming it.
    """
    if not several_processes():
        if error is not None:
            raise error
        return
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, None if error is None else str(error))
    failed = [rank for rank, message in enumerate(messages) if message is not None]
    if not failed:
        return
    if error is None:
        error = CalibrationError(f"process {failed[0]} failed: {messages[failed[0]]}")
    error.told_by = failed[0]
    raise error


def in_any_process(fact: bool) -> bool:
    """Tell whether something is so in at least one process."""
    if not several_processes():
        return fact
    facts = [False] * dist.get_world_size()
    dist.all_gather_object(facts, fact)
    return any(facts)


def merge_across_processes(observation: Observation) -> Observation:
    """Sum every site's moments over the default process group, if there is one.

    Raises:
        CalibrationError: if the processes saw different sites (one had no batches, say).
    """
    if not several_processes():
        return observation
    ffn = observation.ffn
    # A map that reads value states in some processes only is another site there.
    own = [f"{name}, {len(site.train.sum_x)} inputs" for name, site in observation.sites.items()]
    names: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(names, [*own, *(ffn.stages if ffn else ())])
    if any(other != names[0] for other in names):
        counts = ", ".join(str(len(other)) for other in names)
        raise CalibrationError(
            f"the processes saw different sites ({counts}); give every process the same model and "
            "at least one batch"
        )
    for site in observation.sites.values():
        site.train = all_reduce(site.train)
        site.holdout = all_reduce(site.holdout)
        site.details["tokens"] = site.train.count + site.holdout.count
    for stage in ffn.stages.values() if ffn else ():
        stage.merge_across_processes()
    return observation


def all_reduce(moments: Moments) -> Moments:
    """Return the sum of all processes' moments (two reductions: the means, then the products)."""
    n = moments.count
    count = torch.tensor([float(n)], dtype=torch.float64, device=moments.xx.device)
    means = [
        shift * n + total
        for shift, total in (
            (moments.shift_x, moments.sum_x),
            (moments.shift_y, moments.sum_y),
            (moments.shift_t, moments.sum_t),
        )
    ]
    all_sum(count, *means)
    total = int(count.item())
    if total == 0:
        return moments
    own = moments.about(*(mean / total for mean in means))
    all_sum(own.sum_x, own.sum_y, own.sum_t, own.xx, own.yx, own.tx, own.tt, own.yy)
    own.count = total
    return own


def plan_of_first_process(plan: Plan, device: torch.device) -> Plan:
    """Return the plan of process 0: solved on another machine, the last bits may differ.

    Args:
        plan: This process's own plan.
        device: One that the process group can send from (its model's).
    """
    if not several_processes():
        return plan
    data = torch.frombuffer(bytearray(to_bytes(plan)), dtype=torch.uint8).to(device)
    size = torch.tensor([data.numel()], device=device)
    dist.broadcast(size, 0)
    if dist.get_rank() != 0:
        data = torch.empty(int(size.item()), dtype=torch.uint8, device=device)
    dist.broadcast(data, 0)
    return from_bytes(bytes(data.cpu().numpy().tobytes()))
