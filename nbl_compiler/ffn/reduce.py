"""Sums over the processes of a ``torch.distributed`` job."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nbl_compiler.several_processes import several_processes
from nbl_compiler.solvers.ffn_moments import RegressionMoments
from nbl_compiler.solvers.ranges import RangeHistogram

AnyMoments = TypeVar("AnyMoments", bound=RegressionMoments)


def all_sum(*tensors: Tensor) -> None:
    """Replace every tensor, in place, by its sum over the processes."""
    if several_processes():
        for tensor in tensors:
            _reduce(tensor, dist.ReduceOp.SUM)


def _reduce(tensor: Tensor, op: dist.ReduceOp.RedOpType) -> None:
    """Reduce in place; NCCL takes tensors on the GPU alone, and counters live on the host."""
    if dist.get_backend() != "nccl" or tensor.is_cuda:
        dist.all_reduce(tensor, op=op)
        return
    moved = tensor.cuda()
    dist.all_reduce(moved, op=op)
    tensor.copy_(moved)


def merged_moments(moments: AnyMoments) -> AnyMoments:
    """Return the moments of all processes' tokens.

    Shifts differ between processes: everything is first brought to the common mean.
    """
    if not several_processes():
        return moments
    own = moments.count
    count = torch.tensor([float(own)], dtype=torch.float64)
    means = [torch.zeros(n, dtype=torch.float64) for n in (moments.inputs, moments.targets)]
    if own:
        means = [moments.input_mean * own, moments.target_mean * own]
    all_sum(count, *means)
    total = int(count.item())
    if total == 0:
        return moments
    shifted = moments.about(*(mean / total for mean in means))
    all_sum(*shifted.sums())
    shifted.count = total
    return shifted


def merged_histogram(histogram: RangeHistogram) -> RangeHistogram:
    """Return the histogram of all processes' tokens."""
    if not several_processes():
        return histogram
    lowest, highest = histogram.minimum.clone(), histogram.maximum.clone()
    _reduce(lowest, dist.ReduceOp.MIN)
    _reduce(highest, dist.ReduceOp.MAX)
    merged = histogram.covering(lowest, highest)
    tokens = torch.tensor([merged.tokens])
    all_sum(merged.counts, tokens)
    merged.tokens = int(tokens.item())
    return merged
