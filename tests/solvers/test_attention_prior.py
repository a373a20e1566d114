"""The prior of attention maps, and fits that shrink towards a prior."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nbl_compiler.solvers.attention_prior import attention_prior
from nbl_compiler.solvers.least_squares import fit_linear
from nbl_compiler.solvers.moments import Moments

GROUPS, PER_GROUP, SIZE, WIDTH, OUT = 2, 2, 3, 7, 5
HEADS = GROUPS * PER_GROUP
VALUES = GROUPS * SIZE
# The ridge of the prior's own shares, and float32 products.
RECOVERY = 2e-3
seeds = st.integers(0, 1000)


def moments(x: Tensor, y: Tensor) -> Moments:
    made = Moments.zeros(x.shape[1], y.shape[1])
    made.add(x, y, torch.zeros_like(y))
    return made


def own_maps(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return V [G, D, d] and O [d_out, H, D]."""
    value = torch.randn(GROUPS, SIZE, WIDTH, generator=generator)
    return value, torch.randn(OUT, HEADS, SIZE, generator=generator)


def fixed_attention(rows: Tensor, value: Tensor, output: Tensor, shares: Tensor) -> Tensor:
    """Return Σ_h O_h Σ_s shares[h, s] (what h's key/value head has in source s), head by head."""
    x, states = rows[:, :WIDTH], rows[:, WIDTH:].unflatten(1, (-1, GROUPS, SIZE))
    result = torch.zeros(len(rows), OUT)
    for head in range(HEADS):
        group = head // PER_GROUP
        mixed = shares[head, 0] * x @ value[group].T
        for state in range(states.shape[1]):
            mixed = mixed + shares[head, 1 + state] * states[:, state, group]
        result += mixed @ output[:, head].T
    return result


@settings(max_examples=20)
@given(seeds, st.integers(0, 3))
def test_attention_in_fixed_proportions_is_recovered_from_few_rows(seed: int, states: int) -> None:
    """With fewer rows than regressors, which a regression alone cannot do."""
    generator = torch.Generator().manual_seed(seed)
    value, output = own_maps(generator)
    shares = torch.randn(HEADS, 1 + states, generator=generator)
    width = WIDTH + states * VALUES
    few = torch.randn(width, width, generator=generator)
    others = torch.randn(200, width, generator=generator)
    y = fixed_attention(few, value, output, shares) + 3.0
    prior = attention_prior(moments(few, y), value, output).float()
    wanted = fixed_attention(others, value, output, shares)
    error = (others @ prior.T - wanted).square().sum() / wanted.square().sum()
    assert error < RECOVERY


@settings(max_examples=20)
@given(seeds, st.sampled_from([0.0, 0.01, "auto"]))
def test_a_prior_is_taken_only_where_it_lowers_the_held_out_error(
    seed: int, ridge: float | str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(140, 40, generator=generator)
    truth = torch.randn(6, 40, generator=generator)
    y = x @ truth.T + torch.randn(140, 6, generator=generator)
    train, holdout = moments(x[:60], y[:60]), moments(x[60:], y[60:])
    plain = fit_linear(train, holdout, ridge)
    for prior in (truth, torch.randn(6, 40, generator=generator) * 5, torch.zeros(6, 40)):
        fit = fit_linear(train, holdout, ridge, prior)
        assert fit.holdout_nmse <= plain.holdout_nmse
        errors = y[60:] - x[60:] @ fit.weight.T.float() - fit.bias.float()
        nmse = errors.square().sum() / (y[60:] - y[60:].mean(0)).square().sum()
        assert abs(float(nmse) - fit.holdout_nmse) < 1e-4
        if not fit.shrunk_to_prior:
            assert torch.equal(fit.weight, plain.weight)
    if ridge == "auto":
        best = fit_linear(train, holdout, ridge, truth)
        assert best.shrunk_to_prior
        assert best.holdout_nmse < 0.9 * plain.holdout_nmse


@settings(max_examples=20)
@given(seeds)
def test_moments_of_what_a_map_leaves(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(50, 4, generator=generator) + 2
    y, weight = torch.randn(50, 3, generator=generator), torch.randn(3, 4, generator=generator)
    left, wanted = moments(x, y).residual(weight.double()), moments(x, y - x @ weight.T)
    left, wanted = left.centred(), wanted.centred()
    for name in ("shift_y", "yx", "yy", "xx"):
        torch.testing.assert_close(getattr(left, name), getattr(wanted, name), rtol=1e-5, atol=1e-5)
