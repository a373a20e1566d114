"""Models whose weights are spread over the processes of a ``torch.distributed`` job.

A tensor-parallel transformers model (``tp_plan="auto"``) holds parts of its weights as
``DTensor``s. Its hidden states are whole in every process: x in front of a site, and y behind the
all-reduce. Attention heads and FFN neurons in between are parts.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nbl_compiler.errors import ConfigError
from nbl_compiler.several_processes import ALONE, Share, several_processes


@dataclass(frozen=True)
class Work:
    """What this process does of a job's work, so that every token is counted once.

    Args:
        batches: Its share of the batches. The processes that hold one model together go through
            the same ones.
        rows: Its share of the rows of each batch: the processes of one model all see them.
    """

    batches: Share = ALONE
    rows: Share = ALONE


def is_spread(value: object) -> TypeGuard[Any]:
    """Tell whether a value is a ``DTensor``, of which this process holds a part."""
    # Whoever has made one has imported the module, which all others can do without.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor; of a spread one, all its processes must ask for it."""
    if not is_spread(tensor):
        return tensor
    with torch.no_grad():
        full: Tensor = tensor.full_tensor()
    return full


def whole_of_parts(part: Tensor, dim: int, weight: Any) -> Tensor:
    """Return the tensor whose parts lie in the processes that a weight is spread over.

    Args:
        part: This process's part; it may be larger or smaller than the others' in ``dim``.
        dim: The dimension that is spread.
        weight: The spread weight; its processes hold the parts in their order.
    """
    group = weight.device_mesh.get_group()
    processes = range(dist.get_world_size(group))
    moved = part.movedim(dim, 0).contiguous()
    size = torch.tensor([moved.shape[0]], device=part.device)
    sizes = [torch.empty_like(size) for _ in processes]
    dist.all_gather(sizes, size, group=group)
    largest = int(max(sizes))
    padded = moved.new_zeros(largest, *moved.shape[1:])  # collectives take tensors of one size
    padded[: moved.shape[0]] = moved
    parts = [torch.empty_like(padded) for _ in processes]
    dist.all_gather(parts, padded, group=group)
    joined = torch.cat([p[: int(n)] for p, n in zip(parts, sizes, strict=True)])
    return joined.movedim(0, dim)


def work_of(model: nn.Module) -> Work:
    """Return what this process does of the job's work.

    Raises:
        ConfigError: if the model is spread in a way that calibration cannot follow.
    """
    if not several_processes():
        return Work()
    own = _processes_of(model)
    groups: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(groups, own)
    models = sorted({tuple(group) for group in groups})
    rank = dist.get_rank()
    return Work(Share(models.index(tuple(own)), len(models)), Share(own.index(rank), len(own)))


def _processes_of(model: nn.Module) -> list[int]:
    """Return the ranks that hold this process's model together."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(isinstance(m, fsdp.FSDPModule) for m in model.modules()):
        raise ConfigError(
            "the model is sharded by FSDP, whose weights come and go; load it with "
            'tp_plan="auto", or with a device_map, to calibrate it'
        )
    meshes = {p.device_mesh for p in model.parameters() if is_spread(p)}
    if not meshes:
        return [dist.get_rank()]
    if len(meshes) > 1 or next(iter(meshes)).ndim > 1:
        raise ConfigError(
            "the model's weights are spread over several meshes, or over one of several "
            'dimensions; load it with tp_plan="auto" alone, over one dimension, to calibrate it'
        )
    ranks: list[int] = next(iter(meshes)).mesh.flatten().tolist()
    return ranks
