"""Merging calibration across processes: moments are a commutative monoid, so this is a sum."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from nbl_compiler.errors import CalibrationError
from nbl_compiler.observe import Observation
from nbl_compiler.solvers.moments import Moments


def merge_across_processes(observation: Observation) -> Observation:
    """Sum every site's moments over the default process group, if there is one.

    Raises:
        CalibrationError: if the processes saw different sites (one had no batches, say).
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return observation
    names: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(names, list(observation.sites))
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
    return observation


def all_reduce(moments: Moments) -> Moments:
    """Return the sum of all processes' moments (two reductions: the means, then the products)."""
    n = moments.count
    device = moments.xx.device
    count = torch.tensor([float(n)], dtype=torch.float64, device=device)
    means = [
        shift * n + total
        for shift, total in (
            (moments.shift_x, moments.sum_x),
            (moments.shift_y, moments.sum_y),
            (moments.shift_t, moments.sum_t),
        )
    ]
    for tensor in (count, *means):
        dist.all_reduce(tensor)
    total = int(count.item())
    if total == 0:
        return moments
    own = moments.about(*(mean / total for mean in means))
    products: list[Tensor] = [
        own.sum_x, own.sum_y, own.sum_t, own.xx, own.yx, own.tx, own.tt, own.yy
    ]  # fmt: skip
    for tensor in products:
        dist.all_reduce(tensor)
    own.count = total
    return own
