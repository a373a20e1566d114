"""Gates: the regression finds what made the weights, and the ridge that others confirm."""

from __future__ import annotations

import torch
from torch import Tensor

from nbl_compiler.lowering.mixed_values import bucket_masses, bucket_sizes, bucket_weights
from nbl_compiler.solvers.gates import WeightSamples, fit_gates, joined
from nbl_compiler.value_states import BUCKETS, Gates

WIDTH, HEADS = 12, 3
# Nats of a head: what forty steps of L-BFGS for each ridge leave of a divergence of about one.
FITTED = 1e-3
# Float32: running sums of weights up to 1.
ROUNDING = 1e-6


def counts(tokens: int) -> Tensor:
    """Return n_t of rows of 64 tokens, [1, tokens]."""
    return (torch.arange(tokens) % 64 + 1).unsqueeze(0)


def samples(tokens: int, gates: Gates, seed: int) -> WeightSamples:
    generator = torch.Generator().manual_seed(seed)
    # Components of different sizes and with a mean, as activations have.
    size = torch.logspace(-2, 2, WIDTH)
    x = size * (torch.randn(tokens, WIDTH, generator=generator) + 0.5)
    count = counts(tokens)
    masses = bucket_weights(x.unsqueeze(0), count, gates.weight, gates.offset)[0]
    return WeightSamples(x, masses, bucket_sizes(count)[0])


def some_gates() -> Gates:
    generator = torch.Generator().manual_seed(1)
    shape = (HEADS, 1 + len(BUCKETS))
    size = torch.logspace(-2, 2, WIDTH)
    weight = torch.randn(*shape, WIDTH, generator=generator) / size / WIDTH**0.5
    return Gates(weight, torch.randn(*shape, generator=generator))


def divergence(gates: Gates, on: WeightSamples) -> float:
    scores = torch.einsum("nd,hbd->nhb", on.x, gates.weight) + gates.offset
    log_p = (scores + on.sizes.log()[:, None]).log_softmax(-1)
    terms = torch.xlogy(on.masses, on.masses) - torch.where(on.masses > 0, on.masses * log_p, 0.0)
    return float(terms.sum(-1).mean())


def test_the_gates_that_made_the_weights_are_found() -> None:
    true = some_gates()
    train, held, fresh = (samples(n, true, seed) for seed, n in enumerate((2048, 512, 512)))
    made, told = fit_gates(train, held)
    plain = Gates(torch.zeros_like(made.weight), torch.zeros_like(made.offset))
    assert divergence(plain, fresh) > 0.3
    assert divergence(made, fresh) < FITTED
    assert abs(divergence(made, held) - told) < 1e-4


def test_weights_without_reason_are_not_learnt_by_heart() -> None:
    """Few tokens, weights that have nothing to do with x: hardly worse than no gates at all."""
    generator = torch.Generator().manual_seed(0)
    made_of = samples(512, some_gates(), 0)
    random = torch.rand(made_of.masses.shape, generator=generator) * (made_of.sizes[:, None] > 0)
    noise = WeightSamples(made_of.x, random / random.sum(-1, keepdim=True), made_of.sizes)
    half = WeightSamples(noise.x[:256], noise.masses[:256], noise.sizes[:256])
    other = WeightSamples(noise.x[256:], noise.masses[256:], noise.sizes[256:])
    gates, _ = fit_gates(half, other)
    constant, _ = fit_gates(WeightSamples(torch.zeros_like(half.x), half.masses, half.sizes), other)
    constant = Gates(torch.zeros_like(constant.weight), constant.offset)
    assert divergence(gates, other) < divergence(constant, other) + 0.05


def test_without_held_out_tokens_something_is_fitted() -> None:
    true = some_gates()
    train, fresh = samples(2048, true, 0), samples(512, true, 1)
    none = WeightSamples(train.x[:0], train.masses[:0], train.sizes[:0])
    made, _ = fit_gates(train, none)
    plain = Gates(torch.zeros_like(made.weight), torch.zeros_like(made.offset))
    assert divergence(made, fresh) < 0.5 * divergence(plain, fresh)


def test_samples_are_joined_in_order() -> None:
    true = some_gates()
    parts = [samples(64, true, seed) for seed in range(3)]
    whole = joined(parts)
    assert torch.equal(whole.x[64:128], parts[1].x)
    assert torch.equal(whole.masses[128:], parts[2].masses)
    assert torch.equal(whole.sizes[:64], parts[0].sizes)


def test_masses_are_sums_over_distances() -> None:
    generator = torch.Generator().manual_seed(2)
    length = 40
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    allowed[25:, :25] = False  # a second document
    scores = torch.randn(2, HEADS, length, length, generator=generator)
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    found = bucket_masses(weights, allowed.sum(-1).unsqueeze(0))
    assert found.shape == (2, length, HEADS, 1 + len(BUCKETS))
    for token in range(length):
        begin = 25 if token >= 25 else 0
        expected = torch.zeros(2, HEADS, 1 + len(BUCKETS))
        expected[..., 0] = weights[:, :, token, begin]
        for position in range(begin + 1, token + 1):
            (bucket,) = [
                i
                for i, (first, last) in enumerate(BUCKETS, start=1)
                if first <= token - position <= (length if last is None else last)
            ]
            expected[..., bucket] += weights[:, :, token, position]
        torch.testing.assert_close(found[:, token], expected, rtol=0, atol=ROUNDING)
