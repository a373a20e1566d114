"""Gates of mixed values: multinomial logistic regression of attention's weights on x.

    maximise  Σ_t Σ_b m_tb log p(b | x_t),    p = softmax over b of (g_b · x_t + o_b + log n_tb)

for each head on its own, where m is how much weight the model's attention gives to bucket b. It is
convex; a ridge on g (for inputs of variance 1) is chosen by held-out tokens. Of many tokens some
are enough to choose it; the fit then goes on from there with all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nbl_compiler.value_states import Gates

RIDGE, WEAKER, STRONGER = 1e-2, (3e-3, 1e-3, 3e-4), (3e-2, 1e-1)
"""Where the search begins, and where it goes from there, until held-out tokens object: thousands of
tokens want a weaker one, hundreds a stronger one. Each fit starts where the one before it ended."""
ITERATIONS = 40
"""Of L-BFGS for each."""
SEARCH_TOKENS = 16_384
"""To choose the ridge on."""
IMPOSSIBLE = -60.0
"""Least log-probability: of buckets that are empty, whose weight is 0."""


@dataclass(frozen=True)
class WeightSamples:
    """What some tokens' attention did.

    Args:
        x: Hidden states, [n, d]; of any float dtype, the others are float32.
        masses: Weights of buckets, [n, heads, 1 + buckets].
        sizes: Positions in the buckets, [n, 1 + buckets].
    """

    x: Tensor
    masses: Tensor
    sizes: Tensor


def fit_gates(train: WeightSamples, holdout: WeightSamples) -> tuple[Gates, float]:
    """Return gates, and the mean held-out Σ_b m_b log(m_b / p_b) of a head, in nats.

    Without held-out tokens a strong ridge is taken.

    Args:
        train: Tokens to fit.
        holdout: Tokens that choose the ridge.
    """
    train, holdout = (replace(s, x=s.x.float()) for s in (train, holdout))
    mean = train.x.mean(0)
    scale = train.x.std(0).clamp(min=1e-6 * float(train.x.abs().max()) + 1e-12)
    every = _standard(train, mean, scale)
    some = _first(every, SEARCH_TOKENS)
    judged = _standard(holdout, mean, scale) if len(holdout.x) else every
    shape = (train.x.shape[1] + 1, *train.masses.shape[1:])

    def tried(ridge: float, start: Tensor, on: WeightSamples) -> _Tried:
        with torch.enable_grad():
            weight = _fitted(on, ridge, start)
        return _Tried(float(_divergence(judged, weight)), weight, ridge)

    def improved(best: _Tried, ridges: Sequence[float]) -> _Tried:
        for ridge in ridges:
            other = tried(ridge, best.weight, some)
            if other.error >= best.error:
                break
            best = other
        return best

    nothing = train.x.new_zeros(shape)
    if len(holdout.x):
        first = tried(RIDGE, nothing, some)
        best = improved(first, WEAKER)
        if best is first:
            best = improved(first, STRONGER)
    else:
        best = tried(STRONGER[0], nothing, some)
    if len(some.x) < len(every.x):
        best = tried(best.ridge, best.weight, every)
    slopes = best.weight[:-1] / scale[:, None, None]
    offset = best.weight[-1] - torch.einsum("d,dhb->hb", mean, slopes)
    return Gates(slopes.permute(1, 2, 0).contiguous(), offset.contiguous()), best.error / shape[1]


@dataclass(frozen=True)
class _Tried:
    """A fit with one ridge: its held-out divergence, and what it found, [d + 1, heads, buckets]."""

    error: float
    weight: Tensor
    ridge: float


def _first(samples: WeightSamples, tokens: int) -> WeightSamples:
    return WeightSamples(samples.x[:tokens], samples.masses[:tokens], samples.sizes[:tokens])


def _standard(samples: WeightSamples, mean: Tensor, scale: Tensor) -> WeightSamples:
    """Return the samples with inputs of mean 0 and variance 1, and a last one that is 1."""
    x = (samples.x - mean) / scale
    return WeightSamples(
        torch.cat([x, x.new_ones(len(x), 1)], 1), samples.masses, samples.sizes.log()
    )


def _divergence(samples: WeightSamples, weight: Tensor) -> Tensor:
    """Return the mean over tokens of Σ_h Σ_b m log(m / p); the samples are standard."""
    scores = (samples.x @ weight.flatten(1)).unflatten(-1, tuple(weight.shape[1:]))
    log_p = (scores + samples.sizes[:, None]).log_softmax(-1).clamp(min=IMPOSSIBLE)
    masses = samples.masses
    missing: Tensor = torch.xlogy(masses, masses) - masses * log_p
    return missing.sum((1, 2)).mean()


def _fitted(samples: WeightSamples, ridge: float, start: Tensor) -> Tensor:
    weight = start.clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [weight], max_iter=ITERATIONS, history_size=10, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        solver.zero_grad()
        value = _divergence(samples, weight) + ridge * weight[:-1].square().sum()
        value.backward()
        return value

    solver.step(loss)
    return weight.detach()


def joined(samples: Sequence[WeightSamples]) -> WeightSamples:
    """Return several samples as one."""
    return WeightSamples(
        torch.cat([s.x for s in samples]),
        torch.cat([s.masses for s in samples]),
        torch.cat([s.sizes for s in samples]),
    )
