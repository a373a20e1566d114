"""Predictors, their certificates, and the fit of slopes behind a guard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from helpers.guarded_sites import NEURONS, WIDTH, gated_site
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nbl_compiler.config import FFN
from nbl_compiler.errors import ConfigError
from nbl_compiler.ffn import predicted
from nbl_compiler.ffn.guarded import restore
from nbl_compiler.ffn.sites import FFNRows, FFNSite
from nbl_compiler.ffn.stages import NeuronStage, Stage
from nbl_compiler.lowering.guarded_ffn import dense_output, reference, true_preactivations
from nbl_compiler.lowering.guarded_ffn_inductor import fused_prediction
from nbl_compiler.lowering.guarded_fit import (
    MIN_TOKENS,
    SlopeMoments,
    Slopes,
    fold_slopes,
)
from nbl_compiler.lowering.predictors import fit_low_rank, pack, predict, unpack
from nbl_compiler.lowering.quantization import CLIPPINGS, fit_quantized
from nbl_compiler.solvers.folding import FFNWeights, hidden_product

# Float64 sums of a few hundred terms of about one.
FLOAT64 = {"atol": 1e-9, "rtol": 1e-9}
# Float32 sums of fewer than 1,000 terms of about one.
FLOAT32 = {"atol": 3e-5, "rtol": 3e-5}
ALL_BITS = [2, 4, 8]


@given(
    seed=st.integers(0, 1000),
    bits=st.sampled_from(ALL_BITS),
    rows=st.integers(0, 5),
    width=st.integers(1, 67),
)
def test_packing_loses_nothing(seed: int, bits: int, rows: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, width), dtype=torch.uint8, generator=generator)
    packed = pack(codes, bits)
    assert packed.shape == (rows, -(-width * bits // 8))
    assert torch.equal(unpack(packed, bits, width), codes)


@given(
    seed=st.integers(0, 1000),
    bits=st.sampled_from(ALL_BITS),
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e3, 1e18]),
    width=st.sampled_from([1, 60, 333]),
    centred=st.booleans(),
)
def test_rounding_certificate_holds(
    seed: int, bits: int, scale: float, width: int, centred: bool
) -> None:
    """|ẑ − z| ≤ radius ‖x − centre‖ + rounding (‖x‖ + 1), both sides as float32 computes them.

    Half of the inputs point along a row's rounding error, where Cauchy–Schwarz is an equality.
    """
    torch.manual_seed(seed)
    weight, bias = torch.randn(17, width) * torch.rand(17, 1), torch.randn(17)
    mean = torch.randn(width) if centred else None
    predictor = fit_quantized(weight, bias, bits, mean, certified=True)
    codes = unpack(predictor.codes, bits, width).float()
    error = weight - (codes * predictor.scale[:, None] + predictor.shift[:, None])
    directions = torch.cat([torch.randn(8, width), error / error.norm(dim=1, keepdim=True)])
    x = scale * directions.nan_to_num() + (0.0 if mean is None else mean)
    exact = torch.nn.functional.linear(x, weight, bias)
    for value, slack in (predictor(x), fused_prediction(predictor.kind, predictor.tensors, x)):
        assert slack is not None
        assert ((value - exact).abs() <= slack).all()


def test_certificate_is_tight() -> None:
    """Along a row's rounding error the radius is reached."""
    weight = torch.randn(9, 256)
    predictor = fit_quantized(weight, None, 4, certified=True)
    codes = unpack(predictor.codes, 4, 256).float()
    error = weight - (codes * predictor.scale[:, None] + predictor.shift[:, None])
    x = error / error.norm(dim=1, keepdim=True)
    value, slack = predictor(x)
    assert slack is not None
    ratio = ((value - x @ weight.T).abs() / slack).diagonal()
    assert (ratio > 0.98).all()


@pytest.mark.parametrize("bits", ALL_BITS)
def test_offset_removes_the_error_at_the_mean(bits: int) -> None:
    weight, bias, mean = torch.randn(33, WIDTH), torch.randn(33), torch.randn(WIDTH)
    predictor = fit_quantized(weight, bias, bits, mean)
    torch.testing.assert_close(
        predictor(mean).value[0], torch.nn.functional.linear(mean, weight, bias), **FLOAT32
    )


def test_clipping_serves_two_bits() -> None:
    """At 2 bits the range with the least error halves the error of the full range, at least."""
    weight = torch.randn(64, 640)
    predictor = fit_quantized(weight, None, 2)
    rounded = unpack(predictor.codes, 2, 640) * predictor.scale[:, None] + predictor.shift[:, None]
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    full = ((weight - low) / (high - low) * 3).round() / 3 * (high - low) + low
    assert (weight - rounded).square().sum() < 0.5 * (weight - full).square().sum()
    assert max(CLIPPINGS) == 1.0


def test_quantizer_handles_constant_and_zero_rows() -> None:
    weight = torch.stack([torch.zeros(12), torch.full((12,), 0.7), torch.full((12,), -3.0)])
    x = torch.randn(5, 12)
    predictor = fit_quantized(weight, None, 2, certified=True)
    value, slack = predictor(x)
    assert slack is not None
    torch.testing.assert_close(value, x @ weight.T, **FLOAT32)
    assert slack.isfinite().all()


@pytest.mark.parametrize(("bits", "per_weight"), [(2, 0.25), (4, 0.5), (8, 1.0)])
def test_bytes_of_a_quantized_predictor(bits: int, per_weight: float) -> None:
    predictor = fit_quantized(torch.randn(64, 640), None, bits)
    assert predictor.bytes == 64 * 640 * per_weight + 3 * 4 * 64


def test_bytes_of_a_low_rank_predictor() -> None:
    predictor = fit_low_rank(torch.randn(64, 640), None, 8, dtype=torch.bfloat16)
    assert predictor.bytes == 2 * 8 * (64 + 640) + 4 * 64


def test_low_rank_error_is_that_of_eckart_and_young() -> None:
    """E‖z − ẑ‖² over the inputs equals the sum of the squared singular values left out."""
    weight, bias, mean = torch.randn(40, 30), torch.randn(40), torch.randn(30)
    root = torch.randn(30, 30, dtype=torch.float64)
    covariance = root @ root.T
    predictor = fit_low_rank(weight, bias, 7, covariance, mean, torch.float64)
    error = weight.double() - predictor.coefficients @ predictor.basis
    values, vectors = torch.linalg.eigh(covariance)
    singular = torch.linalg.svdvals(weight.double() @ vectors * values.sqrt())
    torch.testing.assert_close(
        (error @ covariance * error).sum(), singular[7:].square().sum(), **FLOAT64
    )
    at_mean = predict("low_rank", predictor.tensors, mean.double()[None]).value
    torch.testing.assert_close(at_mean[0].float(), weight @ mean + bias, **FLOAT32)


@pytest.mark.parametrize("covariance", [None, torch.diag(torch.arange(12.0))])
def test_full_rank_is_exact(covariance: Tensor | None) -> None:
    weight, x = torch.randn(20, 12), torch.randn(5, 12)
    if covariance is not None:
        x[:, 0] = 0.0  # the direction that does not vary
    predictor = fit_low_rank(weight, None, 12, covariance)
    torch.testing.assert_close(predictor(x).value, x @ weight.T, **FLOAT32)


@pytest.mark.parametrize("rank", [0, 13])
def test_impossible_rank_is_refused(rank: int) -> None:
    with pytest.raises(ConfigError, match=f"rank from 1 to 12, not {rank}"):
        fit_low_rank(torch.randn(20, 12), None, rank)


def test_other_bits_are_refused() -> None:
    with pytest.raises(ConfigError, match="2, 4 or 8 bits, not 3"):
        fit_quantized(torch.randn(4, 4), None, 3)


def test_unknown_predictor_is_refused() -> None:
    with pytest.raises(ConfigError, match="predictor 'oracle' must be one of none, low_rank"):
        predict("oracle", [], torch.randn(1, 4))


@pytest.mark.parametrize("kind", ["low_rank", "quantized_2", "quantized_4", "quantized_8"])
@pytest.mark.parametrize("tokens", [1, 5, 30])
def test_fused_prediction_is_the_prediction(kind: str, tokens: int) -> None:
    tensors, x = gated_site(kind).predictor, torch.randn(tokens, WIDTH)
    torch.testing.assert_close(
        fused_prediction(kind, tensors, x).value, predict(kind, tensors, x).value, **FLOAT32
    )


def _stream(tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gate, up = torch.randn(tokens, NEURONS), torch.randn(tokens, NEURONS)
    hidden = torch.nn.functional.silu(gate) * up
    return gate, up, hidden, torch.rand(tokens, NEURONS) < 0.8


@given(cut=st.integers(0, 90), seed=st.integers(0, 100))
def test_slope_moments_do_not_depend_on_the_cuts(cut: int, seed: int) -> None:
    torch.manual_seed(seed)
    stream = _stream(90)
    whole, first, second = (SlopeMoments(NEURONS, gated=True) for _ in range(3))
    whole.observe(*stream)
    first.observe(*(part[:cut] for part in stream))
    second.observe(*(part[cut:] for part in stream))
    for merged in (first.merge(second), second.merge(first)):
        for found, wanted in zip(merged.slopes(), whole.slopes(), strict=True):
            torch.testing.assert_close(found, wanted, **FLOAT64)


def test_slopes_recover_an_affine_neuron() -> None:
    """From the tokens that stay folded only: the others hold something else."""
    gate, up, _, folded = _stream(200)
    slopes = torch.randn(3, NEURONS)
    hidden = slopes[0] * gate + slopes[1] * up + slopes[2]
    moments = SlopeMoments(NEURONS, gated=True)
    moments.observe(gate, up, torch.where(folded, hidden, 1e3), folded)
    for found, wanted in zip(moments.slopes(), slopes, strict=True):
        torch.testing.assert_close(found.float(), wanted, **FLOAT32)


def test_neurons_that_are_never_folded_keep_their_slopes() -> None:
    _, up, hidden, folded = _stream(200)
    folded[MIN_TOKENS - 1 :, :3] = False
    moments = SlopeMoments(NEURONS, gated=False)
    moments.observe(None, up, hidden, folded)
    former = Slopes(
        None, torch.full((NEURONS,), 7.0).double(), torch.full((NEURONS,), 8.0).double()
    )
    slopes = moments.slopes(former)
    assert slopes.gate is None
    assert (slopes.up[:3] == 7.0).all()
    assert (slopes.intercept[:3] == 8.0).all()
    assert (slopes.up[3:] != 7.0).all()


def test_fold_of_the_slopes() -> None:
    site = gated_site()
    x = torch.randn(9, WIDTH)
    gate, up = true_preactivations(site, x)
    hidden = site.gate_slope * gate + site.up_slope * up + site.intercept
    wanted = hidden @ site.down + site.down_bias
    matrix, bias = (t.float() for t in fold_slopes(site))
    torch.testing.assert_close(x @ matrix.T + bias, wanted, **FLOAT32)


def test_turns_of_fitting_lower_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """One fit on all tokens (no turn) serves the folded tokens worse than fits on them alone."""
    site = gated_site("quantized_4", capacity=13)
    inputs, held = torch.randn(4, 500, WIDTH), torch.randn(1000, WIDTH)
    weights = FFNWeights(
        site.activation, site.gate, site.down.T, site.gate_bias, site.down_bias, site.up,
        site.up_bias,
    )  # fmt: skip
    one = FFNSite("site", weights, (), 0)
    exact = dense_output(site, held)

    def run_pass(stages: Mapping[str, Stage], tokens: int | None = None) -> None:
        del tokens  # all there are
        for x, is_held in (*((x, False) for x in inputs), (held, True)):
            rows = FFNRows(x, hidden_product(weights, x), dense_output(site, x))
            stages["site"].add(rows, held=is_held)

    first = NeuronStage(one, ranges=False)
    run_pass({"site": first})
    options = FFN(keep=0, guard="predicted", capacity=13 / NEURONS)
    errors = []
    for turns in (0, 1, 3):
        monkeypatch.setattr(predicted, "TURNS", turns)
        (fit,) = predicted.fit_predicted(
            {"site": one}, {"site": torch.arange(0)}, {"site": first}, options, "auto", run_pass
        )
        fitted = restore(weights, fit.tensors, fit.details)
        errors.append(float((reference(fitted, held).output - exact).square().sum()))
        assert fit.holdout_nmse > 0
    assert errors[1] < 0.9 * errors[0]
    assert errors[2] < errors[1]
    unguarded = replace(fitted, capacity=0)
    assert errors[2] < 0.7 * float((reference(unguarded, held).output - exact).square().sum())
