"""What FFN stages add up over the processes of a ``torch.distributed`` job."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist

from nbl_compiler.several_processes import all_sum, reduce_in_place, several_processes
from nbl_compiler.solvers.ffn_moments import RegressionMoments
from nbl_compiler.solvers.ranges import RangeHistogram

AnyMoments = TypeVar("AnyMoments", bound=RegressionMoments)


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
    reduce_in_place(lowest, dist.ReduceOp.MIN)
    reduce_in_place(highest, dist.ReduceOp.MAX)
    merged = histogram.covering(lowest, highest)
    tokens = torch.tensor([merged.tokens])
    all_sum(merged.counts, tokens)
    merged.tokens = int(tokens.item())
    return merged
