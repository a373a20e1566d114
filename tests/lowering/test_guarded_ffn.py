"""The guarded FFN: its meaning, and the form that Inductor compiles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from helpers.guarded_sites import WIDTH, folded, gated_site, plain_site
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from nbl_compiler.errors import ConfigError
from nbl_compiler.ffn.sites import FFNRows
from nbl_compiler.ffn.stages import RecallStage
from nbl_compiler.guard_counters import accumulate, new_counters, read
from nbl_compiler.lowering.guarded_ffn import (
    choose,
    dense_output,
    reference,
    run,
    true_preactivations,
)
from nbl_compiler.lowering.guarded_ffn_inductor import (
    GATHER_TOKENS,
    register_guarded_ffn,
    traceable,
)
from nbl_compiler.lowering.guarded_site import ACTIVATIONS, GuardedFFN
from nbl_compiler.solvers.activation_errors import max_affine_error
from nbl_compiler.solvers.activations import ACTIVATION_NAMES, activation

# The same sums in another order, over fewer than 200 terms of about one.
ROUNDING = {"atol": 2e-5, "rtol": 2e-5}
# One rounding to the output's dtype.
HALF_ROUNDING = {"atol": 2e-2, "rtol": 1e-2}
# Accumulated float32 rounding of outputs of size |x| times about one, relative to |x|.
RELATIVE_ROUNDING = 1e-4
EVERYWHERE = 1e6

SITES = {
    "exact": lambda **k: plain_site(exact=True, scored=False, **k),
    "certified": lambda **k: plain_site("quantized_8", exact=True, capacity=40, **k),
    "ranges, 4 bits": lambda **k: plain_site("quantized_4", activation="gelu_tanh", **k),
    "ranges, low rank, truncated": lambda **k: plain_site(
        "low_rank", overflow="truncate", capacity=3, activation="relu", **k
    ),
    "gated, 4 bits, truncated": lambda **k: gated_site("quantized_4", **k),
    "gated, low rank, threshold": lambda **k: gated_site(
        "low_rank", overflow="dense", capacity=100, threshold=0.05, activation="gelu_tanh", **k
    ),
    "predicted values": lambda **k: gated_site("quantized_4", values="predicted", **k),
    "predicted values, plain": lambda **k: plain_site(
        "low_rank", overflow="truncate", capacity=9, values="predicted", **k
    ),
    "predicted values, dense tokens": lambda **k: plain_site(
        "quantized_8", capacity=14, values="predicted", **k
    ),
    "gated, no predictor": lambda **k: gated_site(
        overflow="dense", capacity=119, threshold=0.05, **k
    ),
}


@pytest.fixture(autouse=True)
def inductor_path() -> Iterator[None]:
    """Register the path; do not let AOTAutograd return what an earlier version compiled."""
    register_guarded_ffn()
    with torch._functorch.config.patch(enable_autograd_cache=False):
        yield


def assert_same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], **tolerance: float) -> None:
    torch.testing.assert_close(found[0], wanted[0], equal_nan=True, **(tolerance or ROUNDING))
    assert torch.equal(found[1], wanted[1])
    assert torch.equal(found[2], wanted[2])


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
def test_activations_are_those_of_the_solvers(name: str) -> None:
    z = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    torch.testing.assert_close(ACTIVATIONS[name](z), activation(name)(z), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("activation_name", ["gelu", "relu2"])
def test_all_in_range_is_the_affine_form(activation_name: str) -> None:
    site = plain_site(exact=True, half_range=EVERYWHERE, activation=activation_name, capacity=0)
    x = torch.randn(7, WIDTH)
    result = run(site, x)
    torch.testing.assert_close(
        result.output, torch.nn.functional.linear(x, site.folded, site.folded_bias), **ROUNDING
    )
    assert not result.outliers.any()
    assert not result.dense.any()


@pytest.mark.parametrize("capacity", [0, 131])
@pytest.mark.parametrize("make", [plain_site, gated_site])
def test_all_outside_is_the_dense_ffn(make: object, capacity: int) -> None:
    """With room for all neurons by correcting each; without room by the dense path."""
    if make is plain_site:
        site = plain_site(exact=True, capacity=capacity)
        site.low.fill_(EVERYWHERE)
        site.high.fill_(EVERYWHERE)
    else:
        site = gated_site(capacity=capacity, overflow="dense")
    x = torch.randn(5, WIDTH)
    result = run(site, x)
    torch.testing.assert_close(result.output, dense_output(site, x), **ROUNDING)
    assert result.dense.all() == (capacity == 0)


@given(seed=st.integers(0, 10_000), scale=st.sampled_from([1e-3, 0.3, 1.0, 4.0, 1e3]))
def test_exact_guard_obeys_its_certificate(seed: int, scale: float) -> None:
    """|y − y_dense| ≤ Σ_i |W2[j, i]| max error of neuron i in its range, for every input."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    site = plain_site(exact=True, capacity=30, scored=False)
    errors = max_affine_error(
        activation("gelu"), site.low, site.high, site.up_slope, site.intercept
    )
    bound = site.down.double().abs().T @ errors
    x = scale * torch.randn(4, WIDTH, generator=generator)
    excess = (reference(site, x).output - dense_output(site, x)).abs() - bound
    assert excess.max() <= RELATIVE_ROUNDING * (1 + scale)


@given(seed=st.integers(0, 10_000), scale=st.sampled_from([1e-3, 0.3, 1.0, 4.0, 1e3]))
def test_certified_predictor_keeps_the_exact_guard(seed: int, scale: float) -> None:
    """Widened by the rounding bound, the predicted test selects the same outliers."""
    torch.manual_seed(seed)
    site = plain_site("quantized_8", exact=True, capacity=131)
    exact = replace(site, predictor=[], predictor_kind="none")
    x = scale * torch.randn(4, WIDTH)
    assert torch.equal(choose(site, x)[1], choose(exact, x)[1])


def test_predicted_guard_corrects_what_it_flags() -> None:
    """A flagged neuron within its range is corrected too; an unflagged one outside is not."""
    site = plain_site("quantized_2", capacity=131)
    x = torch.randn(50, WIDTH)
    flagged, chosen = choose(site, x)
    _, up = true_preactivations(site, x)
    outside = ~((up >= site.low) & (up <= site.high))
    assert torch.equal(flagged, chosen)
    assert (flagged & ~outside).any()
    assert (outside & ~flagged).any()


def test_truncation_keeps_the_largest_scores() -> None:
    site = gated_site(capacity=5)
    x = torch.randn(6, WIDTH)
    gate, up = true_preactivations(site, x)
    assert gate is not None
    fit = site.up_slope * up + site.gate_slope * gate + site.intercept
    score = (torch.nn.functional.silu(gate) * up - fit).abs() * site.column_norm
    wanted = torch.zeros_like(score, dtype=torch.bool).scatter(1, score.topk(5).indices, True)
    assert torch.equal(choose(site, x)[1], wanted)


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_inputs_propagate_as_in_the_dense_model(name: str, poison: float) -> None:
    site = SITES[name]()
    x = torch.randn(3, WIDTH)
    x[1, 17] = poison
    for result in (reference(site, x), traceable(site, x)):
        assert result.dense[1]
        torch.testing.assert_close(
            result.output[1], dense_output(site, x)[1], equal_nan=True, **ROUNDING
        )
        assert result.output[[0, 2]].isfinite().all()


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3,), (2, 3), (2, 0, 5), (3, 21)])
@pytest.mark.parametrize("name", SITES)
def test_any_shape(name: str, shape: tuple[int, ...]) -> None:
    site = SITES[name]()
    x = torch.randn(*shape, WIDTH)
    result = run(site, x)
    tokens = x.reshape(-1, WIDTH).shape[0]
    assert result.output.shape == (*shape, WIDTH)
    assert result.outliers.shape == result.dense.shape == (tokens,)
    assert_same(traceable(site, x), result)


@pytest.mark.parametrize("tokens", [1, 3, GATHER_TOKENS, GATHER_TOKENS + 1, 63])
@pytest.mark.parametrize("name", SITES)
def test_inductor_form_equals_the_reference(name: str, tokens: int) -> None:
    site = SITES[name]()
    x = torch.randn(tokens, WIDTH)
    assert_same(traceable(site, x), reference(site, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("tokens", [3, 20])
@pytest.mark.parametrize("name", SITES)
def test_inductor_form_in_other_dtypes(name: str, tokens: int, dtype: torch.dtype) -> None:
    site = SITES[name](dtype=dtype)
    x = torch.randn(tokens, WIDTH).to(dtype)
    result = traceable(site, x)
    assert result.output.dtype == dtype
    assert_same(result, reference(site, x), **HALF_ROUNDING)


@pytest.mark.parametrize("name", ["certified", "gated, 4 bits, truncated"])
@pytest.mark.parametrize("tokens", [1, 20])
def test_compiles_without_graph_break(name: str, tokens: int) -> None:
    """Inductor compiles the op into its own kernels, one graph, and agrees with the reference."""
    site, x = SITES[name](), torch.randn(tokens, WIDTH)
    if tokens > 1:
        x[1] = float("nan")

    def model(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(run(site, x.sin()))

    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, dynamic=False)
        found, (code,) = run_and_get_code(compiled, x)
        assert_same(found, reference(site, x.sin()))
    assert "torch.ops.nbl" not in code


def test_dense_path_and_counters_compile() -> None:
    """Counters change in the graph; the dense path runs only where a token needs it."""
    site = replace(plain_site("quantized_4"), capacity=14)
    counters = new_counters()

    @torch.compile(fullgraph=True)
    def model(x: Tensor, counters: Tensor) -> Tensor:
        output, outliers, dense = run(site, x)
        accumulate(counters, outliers, dense)
        return output

    wanted = []
    with torch.no_grad():
        for tokens in (6, 2, 5):
            x = torch.randn(tokens, WIDTH)
            result = reference(site, x)
            wanted.append((result.outliers, result.dense))
            torch.testing.assert_close(model(x, counters), result.output, **ROUNDING)
    outliers, dense = (torch.cat(list(parts)) for parts in zip(*wanted, strict=True))
    counts = read(counters)
    assert counts.tokens == 13
    assert counts.outliers == int(outliers.sum())
    assert counts.most_outliers == int(outliers.max())
    assert 0 < counts.dense_tokens == int(dense.sum()) < 13
    assert counts.outliers_per_token == pytest.approx(float(outliers.float().mean()))


def test_counters_without_tokens() -> None:
    counters = new_counters()
    result = reference(plain_site(), torch.randn(0, WIDTH))
    accumulate(counters, result.outliers, result.dense)
    counts = read(counters)
    assert (counts.tokens, counts.outliers_per_token, counts.dense_share) == (0, 0.0, 0.0)


def predictor_recall(site: GuardedFFN, x: Tensor) -> float:
    stage = RecallStage(site)
    stage.add(FFNRows(x, x, x), held=False)
    return stage.recall


def test_recall_counts_what_was_found() -> None:
    stage = RecallStage(gated_site())
    assert stage.recall == 1.0  # of no outlier, none is missed
    stage.found += 3
    stage.true += 4
    assert stage.recall == 0.75


def test_recall_grows_with_the_bits() -> None:
    recalls = []
    for bits in (2, 4, 8):
        torch.manual_seed(3)
        recalls.append(predictor_recall(gated_site(f"quantized_{bits}"), torch.randn(100, WIDTH)))
    assert 0.3 < recalls[0] < recalls[1] < recalls[2]
    assert recalls[2] > 0.97
    assert predictor_recall(gated_site(), torch.randn(10, WIDTH)) == 1.0


@pytest.mark.parametrize("name", ["certified", "gated, 4 bits, truncated"])
def test_schema_and_fake_kernel(name: str) -> None:
    site = SITES[name]()
    torch.library.opcheck(
        torch.ops.nbl.guarded_ffn.default,
        (torch.randn(2, 3, WIDTH), *site.arguments()),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "tanh"}, "activation 'tanh' must be one of gelu"),
        ({"predictor_kind": "oracle"}, "predictor_kind 'oracle' must be one of none"),
        ({"overflow": "wrap"}, "overflow='wrap' must be"),
        ({"capacity": -1}, "capacity=-1 must be at least 0"),
        ({"gate_slope": torch.zeros(131)}, "gate and gate_slope belong together"),
        ({"low": None}, "low and high belong together"),
        ({"low": None, "high": None, "column_norm": None}, "column_norm is needed"),
        ({"exact": True, "overflow": "truncate"}, "an exact guard cannot truncate"),
        ({"exact": True, "predictor_kind": "low_rank"}, "needs ranges and a certified predictor"),
    ],
)
def test_contradictions_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(plain_site(), **change)


def test_ranges_on_a_gated_ffn_are_refused() -> None:
    limit = torch.ones(131)
    with pytest.raises(ConfigError, match="a gated FFN has no ranges"):
        replace(gated_site(), low=-limit, high=limit)


def test_folding_is_associative_with_keeping() -> None:
    """Kept neurons beside a guarded rest: dense where the guard has room for all the rest."""
    whole = gated_site(capacity=131)
    kept = torch.arange(0, 131, 4)
    rest = torch.tensor([i for i in range(131) if i % 4])
    x = torch.randn(5, WIDTH)
    guarded = folded(_neurons(whole, rest, folded_bias=whole.folded_bias.clone()))
    exact = dense_output(replace(_neurons(whole, kept), down_bias=None), x)
    torch.testing.assert_close(run(guarded, x).output + exact, dense_output(whole, x), **ROUNDING)


def _neurons(site: GuardedFFN, chosen: Tensor, **change: Tensor) -> GuardedFFN:
    names = ("gate", "up", "down", "gate_bias", "up_bias", "gate_slope", "up_slope", "intercept",
             "column_norm")  # fmt: skip
    return replace(site, **{name: getattr(site, name)[chosen] for name in names}, **change)
