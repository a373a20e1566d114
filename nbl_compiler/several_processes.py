"""Whether calibration runs in several processes, and what each of them does."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

import torch.distributed as dist
from torch import Tensor

from nbl_compiler.errors import NBLError


def several_processes() -> bool:
    """Tell whether this is one process of a ``torch.distributed`` job of more than one."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first_process() -> bool:
    """Tell whether this process speaks for the job: the first one, or the only one."""
    return not several_processes() or dist.get_rank() == 0


def all_sum(*tensors: Tensor) -> None:
    """Replace every tensor, in place, by its sum over the processes."""
    if several_processes():
        for tensor in tensors:
            reduce_in_place(tensor, dist.ReduceOp.SUM)


def reduce_in_place(tensor: Tensor, op: dist.ReduceOp.RedOpType) -> None:
    """Reduce over a job; NCCL takes tensors on the GPU alone, and counters are on the host."""
    if not tensor.numel():
        return
    if dist.get_backend() != "nccl" or tensor.is_cuda:
        dist.all_reduce(tensor, op=op)
        return
    moved = tensor.cuda()
    dist.all_reduce(moved, op=op)
    tensor.copy_(moved)


@dataclass(frozen=True)
class Share:
    """One of several equal shares of something: items ``index``, ``index + count``, …"""

    index: int
    count: int


ALONE = Share(0, 1)


class Failure:
    """Keeps the first error of a ``with`` block that must not end in one process alone.

    A process that stopped in the middle of a tensor-parallel model would leave the others waiting
    for its part of a sum.

    Args:
        raised_later: Keep errors until ``check``; without, they are raised where they happen.
    """

    def __init__(self, *, raised_later: bool) -> None:
        self._raised_later = raised_later
        self._first: NBLError | None = None

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if not self._raised_later or not isinstance(error, NBLError):
            return False
        self._first = self._first or error
        return True

    def check(self) -> None:
        """Raise the first error, if there was one."""
        if self._first is not None:
            raise self._first
