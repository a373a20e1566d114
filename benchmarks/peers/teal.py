"""TEAL: the small entries of what a matrix reads are zero, so their columns need not be read.

Liu et al. 2024, arXiv 2408.14690: s_t(x) = x · 1[|x| > t] in front of every projection, t a
quantile over calibration text. The published recipe, implemented here, on the FFNs' projections
and with one sparsity for all of them (the paper also has a greedy search for one per projection).
Quality by modules that threshold; the speed needs the paper's kernels, so the benchmark gives the
bytes that such kernels would read.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from nbl_compiler.shared_copy import shared_copy
from peers.ffn_inputs import Batch, visit_ffns
from peers.ffn_modules import FFNModules, find_ffns
from peers.thresholds import Sparsify, magnitude_quantile


def teal(model: nn.Module, batches: Sequence[Batch], sparsity: float) -> nn.Module:
    """Return a copy whose FFN projections see only the largest 1 − ``sparsity`` of their inputs."""
    thresholds: dict[str, tuple[float, float]] = {}

    def visit(ffn: FFNModules, x: Tensor) -> None:
        both = (x, ffn.hidden(x))
        first, second = (magnitude_quantile(values, sparsity) for values in both)
        thresholds[ffn.name] = first, second

    visit_ffns(model, batches, visit)
    sparse = shared_copy(model)
    for ffn in find_ffns(sparse):
        first, second = thresholds[ffn.name]
        for path, threshold in (*((row, first) for row in ffn.rows), (ffn.down, second)):
            ffn.replace(path, nn.Sequential(Sparsify(threshold), ffn.linear(path)))
    return sparse


def unread_parameters(model: nn.Module, sparsity: float) -> int:
    """Return how many weights a token would leave unread with the paper's kernels, on average."""
    return round(sparsity * sum(ffn.parameters for ffn in find_ffns(model)))
