"""Hot ranges: where a neuron's pre-activation mostly lies, and which share of it to cover.

TARDIS (arXiv 2501.10054) grows each neuron's range outward from its densest point, and divides a
global in-range target between layers and neurons by their error. Here the division is solved
rather than searched: with one Lagrange multiplier for all layers, every neuron takes the coverage
at which one more token in range costs as much weighted error as in every other neuron.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nbl_compiler.errors import CalibrationError
from nbl_compiler.solvers.activations import Activation
from nbl_compiler.solvers.affine_fit import ActivationMoments
from nbl_compiler.solvers.ranges import RangeHistogram

COVERAGE_LEVELS: tuple[float, ...] = (
    *(level / 20 for level in range(1, 18)),
    *(0.88, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.985, 0.99, 0.995, 0.998, 0.999, 1.0),
)
"""Shares of its tokens between which a neuron's range is chosen; denser where ranges get wide."""

_GAUSS_OFFSET = 0.5 / 3**0.5
"""Two-point Gauss-Legendre abscissa, in bin widths from the centre of a bin: exact for cubics, an
error of order (bin width)⁴ for a smooth activation under a density that is uniform in the bin."""

_SMOOTHING = (1.0, 4.0, 6.0, 4.0, 1.0)
"""Binomial kernel over the counts. It decides only where a range grows, so that an accidental gap
in the histogram does not stop it; coverage is counted exactly."""

_MULTIPLIER_HALVINGS = 100
_MULTIPLIER_RANGE = (1e-18, 1e18)


@dataclass(frozen=True)
class CoverageCurves:
    """For each neuron the nested hot ranges of growing coverage; tensors [f, levels] float64.

    Args:
        lo: Left ends, at bin boundaries.
        hi: Right ends, at bin boundaries.
        coverage: Share of the calibration tokens inside, at least the level's.
        error: Mean over *all* tokens of the squared error of the least-squares affine fit inside
            the range, counted as zero outside (outliers are corrected exactly).
    """

    lo: Tensor
    hi: Tensor
    coverage: Tensor
    error: Tensor

    def select(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """The (lo, hi) [f] of one level [f] (int64) per neuron."""
        index = level.to(self.lo.device)[:, None]
        return self.lo.gather(1, index)[:, 0], self.hi.gather(1, index)[:, 0]


def range_moments(
    histogram: RangeHistogram, activation: Activation, lo: Tensor, hi: Tensor
) -> ActivationMoments:
    """Moments of z and σ(z) over the bins inside [lo, hi], each bin taken as uniform.

    Args:
        histogram: Of the pre-activations.
        activation: σ.
        lo: [f], at bin boundaries, as hot ranges are.
        hi: [f], at bin boundaries.
    """
    edges = histogram.edges()
    inside = (edges[:, :-1] >= lo.to(edges)[:, None]) & (edges[:, 1:] <= hi.to(edges)[:, None])
    centre = edges.mean(1)
    sums = _bin_sums(histogram, activation, centre)
    return _moments((sums * inside).sum(-1), activation, centre, histogram.tokens)


def coverage_curves(histogram: RangeHistogram, activation: Activation) -> CoverageCurves:
    """Range, coverage and error of every neuron at each of :data:`COVERAGE_LEVELS`.

    Raises:
        CalibrationError: if the histogram is empty.
    """
    first, last, covered = _grow(histogram)
    levels = torch.tensor(COVERAGE_LEVELS, dtype=torch.float64, device=covered.device)
    step = _first_reaching(covered, levels.expand(histogram.neurons, -1))
    first, last = first.gather(1, step), last.gather(1, step)
    edges = histogram.edges()
    centre = edges.mean(1)
    cumulative = _bin_sums(histogram, activation, centre).cumsum(-1)
    cumulative = torch.nn.functional.pad(cumulative, (1, 0))
    sums = cumulative.gather(-1, (last + 1).expand(6, -1, -1)) - cumulative.gather(
        -1, first.expand(6, -1, -1)
    )
    moments = _moments(sums, activation, centre[:, None], histogram.tokens)
    _, _, error = moments.affine(activation)
    return CoverageCurves(
        lo=edges.gather(1, first),
        hi=edges.gather(1, last + 1),
        coverage=moments.weight,
        error=moments.weight * error,
    )


def allocate_coverage(
    curves: Sequence[CoverageCurves], weights: Sequence[Tensor], target: float
) -> list[Tensor]:
    """Divide a global in-range target between layers and neurons where it costs least error.

    Minimises Σ weight·error over all neurons of all layers, subject to a mean coverage of at
    least ``target``: every neuron takes the level that minimises weight·error − λ·coverage, and
    λ is the least that reaches the target.

    Args:
        curves: One for each layer.
        weights: One [f] for each layer: what a squared error of the neuron's activation costs,
            ‖W2[:, i]‖² divided by the layer's mean squared output, say.
        target: Mean coverage over all neurons, in (0, 1].

    Returns:
        For each layer the index [f] int64 into :data:`COVERAGE_LEVELS`.
    """
    coverage = torch.cat([curve.coverage.cpu() for curve in curves])
    cost = torch.cat(
        [
            weight.double().cpu()[:, None] * c.error.cpu()
            for weight, c in zip(weights, curves, strict=True)
        ]
    )

    def choose(multiplier: float) -> Tensor:
        # From the right, so that of equal costs the widest range is taken.
        gain = (multiplier * coverage - cost).flip(1)
        return len(COVERAGE_LEVELS) - 1 - gain.argmax(1)

    def reached(level: Tensor) -> bool:
        return float(coverage.gather(1, level[:, None]).mean()) >= target

    scale = float(cost.mean()) or 1.0
    low, high = (scale * end for end in _MULTIPLIER_RANGE)
    for _ in range(_MULTIPLIER_HALVINGS):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if reached(choose(middle)) else (middle, high)
    level = choose(high)
    return list(level.split([curve.coverage.shape[0] for curve in curves]))


def _grow(histogram: RangeHistogram) -> tuple[Tensor, Tensor, Tensor]:
    """First and last bin of the growing range after each step, and its coverage; all [f, bins].

    At each step the range takes the denser of its two neighbours; of equally dense ones (both
    empty, mostly) the one beyond which more tokens lie.
    """
    if histogram.tokens == 0:
        raise CalibrationError(f"{histogram.name}: no calibration token reached this FFN")
    counts = histogram.counts.double()
    kernel = torch.tensor(_SMOOTHING, dtype=torch.float64, device=counts.device)
    density = torch.nn.functional.conv1d(
        counts[:, None], (kernel / kernel.sum())[None, None], padding=len(_SMOOTHING) // 2
    )[:, 0]
    outside = torch.full_like(density[:, :1], -1.0)
    density = torch.cat([outside, density, outside], 1)
    cumulative = torch.nn.functional.pad(counts.cumsum(1), (1, 0))
    total = cumulative[:, -1:]
    left = density.argmax(1, keepdim=True) - 1
    right = left.clone()
    first, last = [left], [right]
    for _ in range(histogram.bins - 1):
        below, above = density.gather(1, left), density.gather(1, right + 2)
        rest_below = cumulative.gather(1, left)
        rest_above = total - cumulative.gather(1, right + 1)
        go_left = (below > above) | ((below == above) & (rest_below > rest_above))
        left, right = left - go_left.long(), right + (~go_left).long()
        first.append(left)
        last.append(right)
    begin, end = torch.cat(first, 1), torch.cat(last, 1)
    covered = cumulative.gather(1, end + 1) - cumulative.gather(1, begin)
    return begin, end, covered / histogram.tokens


def _first_reaching(covered: Tensor, target: Tensor) -> Tensor:
    """Index of the first step whose coverage reaches the target: [f, n] for targets [f, n]."""
    # Coverage is a ratio of integers: half a token of tolerance absorbs its rounding.
    step = torch.searchsorted(covered, target.contiguous() - 1e-12)
    return step.clamp_max(covered.shape[1] - 1)


def _bin_sums(histogram: RangeHistogram, activation: Activation, centre: Tensor) -> Tensor:
    """Per-bin sums of 1, z, z², v, z·v, v² about z = centre, v = σ(centre): [6, f, bins]."""
    edges = histogram.edges()
    middle, width = (edges[:, :-1] + edges[:, 1:]) / 2, edges[:, 1:] - edges[:, :-1]
    offset = activation(centre)[:, None]
    half = histogram.counts.double() / 2
    sums = torch.zeros(6, *half.shape, dtype=torch.float64, device=half.device)
    for side in (-_GAUSS_OFFSET, _GAUSS_OFFSET):
        point = middle + side * width
        z, v = point - centre[:, None], activation(point) - offset
        sums += half * torch.stack([torch.ones_like(z), z, z * z, v, z * v, v * v])
    return sums


def _moments(
    sums: Tensor, activation: Activation, centre: Tensor, tokens: int
) -> ActivationMoments:
    """Means and (co)variances from sums [6, ...] about ``centre`` (that broadcasts with ...)."""
    count = sums[0]
    z, z_square, v, product, v_square = sums[1:] / count.clamp_min(1)
    return ActivationMoments(
        weight=count / tokens,
        z=z + centre,
        value=v + activation(centre),
        z_variance=(z_square - z * z).clamp_min(0),
        covariance=product - z * v,
        value_variance=(v_square - v * v).clamp_min(0),
    )
