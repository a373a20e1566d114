"""``nbl.calibrate`` on tiny models: what it sees, what it decides, what it leaves behind."""

from __future__ import annotations

import gc
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo
from helpers.tiny import LAYERS, Wrapped, calibrated, compiled, config, output, text, texts, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from models.architectures import BY_NAME, HIDDEN, VOCABULARY, inputs
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding

import nbl_compiler as nbl
from nbl_compiler.calibration import Calibrated, observe_model
from nbl_compiler.solvers.moments import BufferedMoments, Moments

# Float32 rounding of a whole tiny model, relative to its largest output.
LOGIT_TOLERANCE = 2e-5
# Float32 rounding of activations that reach the moments through other batch shapes.
MOMENT_TOLERANCE = 1e-4

ALL = tuple(range(LAYERS))


def assert_same_moments(first: Moments, second: Moments) -> None:
    assert first.count == second.count
    first, second = first.centred(), second.centred()
    torch.testing.assert_close(
        first.shift_x, second.shift_x, rtol=MOMENT_TOLERANCE, atol=MOMENT_TOLERANCE
    )
    for name in ("xx", "yx", "tt"):
        a, b = getattr(first, name), getattr(second, name)
        scale = float(b.abs().max()) if b.numel() else 1.0
        torch.testing.assert_close(a, b, rtol=0, atol=MOMENT_TOLERANCE * scale)


def assert_same_observation(first: Calibrated, second: Calibrated) -> None:
    assert first.observation.sites.keys() == second.observation.sites.keys()
    for name, site in first.observation.sites.items():
        other = second.observation.sites[name]
        assert_same_moments(site.train, other.train)
        assert_same_moments(site.holdout, other.holdout)


def observe(
    model: nn.Module, batches: Any, holdout: float = 0.4, solve: bool = False
) -> Calibrated:
    return observe_model(model, batches, config(holdout=holdout), progress=False, solve=solve)


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def reference() -> nbl.Plan:
    """What ``calibrated`` says about a tiny model of one layer."""
    return calibrated(tiny(layers=1))


# What is seen.


def padded(rows: list[Tensor], side: str) -> dict[str, Tensor]:
    """Pad rows of several lengths with arbitrary tokens to one batch."""
    length = max(len(row) for row in rows)
    ids, mask = text(len(rows), length, seed=99), torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[i, where], mask[i, where] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(
    ("name", "side"),
    [("llama", "left"), ("bert", "right"), ("opt", "left"), ("t5", "right")],
)
def test_padding_never_enters(name: str, side: str) -> None:
    model = tiny(name, layers=1)
    rows = [text(1, length, seed=length)[0] for length in (90, 64, 71, 127, 16)]
    batch = observe(model, [padded(rows, side)])
    single = observe(model, [row[None] for row in rows])
    assert_same_observation(batch, single)
    for site in batch.observation.sites.values():
        assert site.details["tokens"] == sum(map(len, rows))
        assert site.holdout.count > 0


def test_a_decoder_without_a_mask_does_not_borrow_the_encoders() -> None:
    model = tiny("t5")
    batch = padded([text(1, 20)[0], text(1, 9)[0]], "right")
    batch["decoder_input_ids"] = text(2, 20, seed=5)
    sites = observe(model, [batch], holdout=0.0).observation.sites
    counts = {name: site.train.count for name, site in sites.items()}
    assert counts == {
        name: 29 if name.startswith("encoder") else 40 for name in BY_NAME["t5"].site_names(LAYERS)
    }


def test_the_plan_does_not_depend_on_the_batching() -> None:
    model = tiny()
    whole = torch.cat(texts())
    plans = [
        nbl.calibrate(model, list(whole.split(size)), config(count=1), progress=False)
        for size in (1, 4, 12)
    ]
    for plan in plans[1:]:
        for site, other in zip(plan.sites, plans[0].sites, strict=True):
            assert (site.name, site.decision, site.reason) == (
                other.name, other.decision, other.reason,
            )  # fmt: skip
            assert site.details == other.details
            assert site.holdout_nmse == pytest.approx(other.holdout_nmse, rel=MOMENT_TOLERANCE)
            for key, tensor in site.tensors.items():
                scale = float(other.tensors[key].abs().max())
                torch.testing.assert_close(
                    tensor, other.tensors[key], rtol=0, atol=MOMENT_TOLERANCE * scale
                )


def test_held_out_tokens_follow_fraction_and_seed() -> None:
    model, batches = tiny(), [text(8, 128, seed=s) for s in range(6)]

    def held(seed: int) -> float:
        options = replace(config(holdout=0.25), seed=seed)
        site = next(
            iter(
                observe_model(
                    model, batches, options, progress=False, solve=False
                ).observation.sites.values()
            )
        )
        return site.holdout.count / (site.train.count + site.holdout.count)

    shares = [held(seed) for seed in (0, 1)]
    # 96 blocks of 64 tokens: the standard deviation of the share is 0.044.
    assert all(abs(share - 0.25) < 0.13 for share in shares)
    assert shares[0] != shares[1]


def test_memory_does_not_grow_with_the_text() -> None:
    model = tiny(layers=1)
    sizes = []
    for count in (5, 50):
        held = observe(model, [text(4, 64, seed=s) for s in range(count)]).observation
        sizes.append({n: s.train.nbytes + s.holdout.nbytes for n, s in held.sites.items()})
    assert sizes[0] == sizes[1]


# What is solved.

LINEAR_FAMILIES = ("llama", "gpt2", "qwen3", "gemma3", "phi3", "bert", "falcon", "opt")


@settings(max_examples=len(LINEAR_FAMILIES))
@given(st.sampled_from(LINEAR_FAMILIES), st.integers(0, 1000), st.sampled_from([0.0, "auto"]))
def test_linear_attention_is_recovered(name: str, seed: int, ridge: float | str) -> None:
    """Over one position the softmax is 1, and attention is the linear map Wo Wv."""
    torch._dynamo.reset()
    model = tiny(name, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    batches = [{"inputs_embeds": torch.randn(200, 1, HIDDEN, generator=draw)} for _ in range(2)]
    fresh = {"inputs_embeds": torch.randn(16, 1, HIDDEN, generator=draw)}
    plan = nbl.calibrate(model, batches, config(layers=ALL, ridge=ridge), progress=False)
    dense = output(model, **fresh)
    assert relative_error(output(compiled(model), **fresh), dense) < LOGIT_TOLERANCE
    for site in plan.rewritten:
        assert site.nmse < 1e-6
        assert site.holdout_nmse < 1e-6


def test_values_that_are_constant_over_positions_make_attention_linear() -> None:
    """Each row repeats one token, so every position attends to equal values."""
    model = tiny()
    tokens = torch.arange(5, VOCABULARY)[:, None]
    rows = tokens[torch.randperm(len(tokens))].expand(-1, 8)
    assert len(tokens) > 1.5 * HIDDEN  # enough different inputs to determine the map
    plan = nbl.calibrate(model, [rows], config(layers=(0,), holdout=0.2), progress=False)
    assert plan.rewritten[0].holdout_nmse < 1e-6
    dense = output(model, rows)
    assert relative_error(output(compiled(model), rows), dense) < LOGIT_TOLERANCE
    # And attention does matter: without it the logits are others.
    zero = {key: torch.zeros_like(tensor) for key, tensor in plan.sites[0].tensors.items()}
    sites = (replace(plan.sites[0], tensors=zero), plan.sites[1])
    dropped = compiled(model, plan=replace(plan, sites=sites))
    assert relative_error(output(dropped, rows), dense) > 100 * LOGIT_TOLERANCE


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "vit"])
def test_an_empty_plan_changes_nothing(name: str) -> None:
    model = tiny(name)
    example = inputs(name, batch=4, length=16)
    dense = output(model, **example)
    plan = nbl.calibrate(model, [example], config(count=0), progress=False)
    assert not plan.rewritten
    assert not plan.tensors()
    assert torch.equal(output(compiled(model), **example), dense)
    assert torch.equal(output(model, **example), dense)  # and the model itself is as it was


def test_calibration_is_deterministic() -> None:
    digests = {calibrated(tiny(layers=1)).digest for _ in range(2)}
    assert len(digests) == 1


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_encoder_decoders_name_their_cross_attention(name: str) -> None:
    model = tiny(name)
    plan = nbl.calibrate(model, [inputs(name, 4, 20, s) for s in range(3)], progress=False)
    assert [s.name for s in plan.sites if s.decision != "rejected"] == BY_NAME[name].site_names(
        LAYERS
    )
    rejected = [s for s in plan.sites if s.decision == "rejected"]
    assert len(rejected) == LAYERS
    assert all("cross-attention" in s.reason for s in rejected)
    assert all(math.isnan(s.nmse) for s in rejected)


def test_token_ids_alone_feed_both_sides_of_an_encoder_decoder() -> None:
    model = tiny("t5")
    plan = nbl.calibrate(model, texts(), progress=False)
    assert sum(s.decision != "rejected" for s in plan.sites) == 2 * LAYERS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_other_dtypes(dtype: torch.dtype, reference: nbl.Plan) -> None:
    model = tiny(layers=1).to(dtype)
    plan = calibrated(model, layers=(0,))
    # The model computes other activations (8 bits in bfloat16); its errors are much the same.
    assert plan.sites[0].nmse == pytest.approx(reference.sites[0].nmse, rel=0.05)
    assert plan.rewritten[0].tensors["weight"].dtype == torch.float32
    assert output(compiled(model), text()).dtype == dtype


def test_the_residual_stream_can_be_the_input() -> None:
    plan = calibrated(tiny(), input="residual", layers=ALL)
    normed = calibrated(tiny(), layers=ALL)
    for site, other in zip(plan.rewritten, normed.rewritten, strict=True):
        assert site.details["input"] == "residual"
        assert other.details["input"] == "normed"
        assert not torch.equal(site.tensors["weight"], other.tensors["weight"])


def test_the_users_precision_does_not_reach_the_sums(reference: nbl.Plan) -> None:
    with torch.inference_mode():
        assert calibrated(tiny(layers=1)).digest == reference.digest
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan = calibrated(tiny(layers=1))
    # The model itself did compute in bfloat16 (8 bits); sums in it would not even be finite.
    assert plan.sites[0].nmse == pytest.approx(reference.sites[0].nmse, rel=0.05)


# What is accepted.


def test_every_kind_of_batches_gives_the_same_plan() -> None:
    whole = text(12, 48)
    model = tiny(layers=1)
    mask = torch.ones_like(whole)
    kinds: dict[str, Any] = {
        "tensors": list(whole.split(4)),
        "mappings": [{"input_ids": ids} for ids in whole.split(4)],
        "with mask and labels": [
            {"input_ids": ids, "attention_mask": m, "labels": ids}
            for ids, m in zip(whole.split(4), mask.split(4), strict=True)
        ],
        "tokenizer's batches": [BatchEncoding({"input_ids": ids}) for ids in whole.split(4)],
        "data loader of rows": DataLoader(whole, batch_size=4),  # type: ignore[arg-type]
        "data loader of a data set": DataLoader(TensorDataset(whole), batch_size=4),
        "generator": (ids for ids in whole.split(4)),
    }
    plans = {name: nbl.calibrate(model, batches, progress=False) for name, batches in kinds.items()}
    first = plans["tensors"]
    for name, plan in plans.items():
        assert [s.reason for s in plan.sites] == [s.reason for s in first.sites], name
        for key, tensor in plan.tensors().items():
            torch.testing.assert_close(tensor, first.tensors()[key], msg=lambda m, n=name: n + m)


def test_rows_may_come_one_by_one() -> None:
    rows = text(12, 48)
    assert calibrated_digest(rows) == calibrated_digest([row[None] for row in rows])


def calibrated_digest(batches: Any) -> str:
    return nbl.calibrate(tiny(layers=1), batches, progress=False).digest


def test_a_model_outside_transformers() -> None:
    model = Wrapped(tiny("bert")).eval()
    plan = nbl.calibrate(model, texts(), config(layers=ALL), progress=False)
    assert [s.name for s in plan.rewritten] == [
        f"body.{name}" for name in BY_NAME["bert"].site_names(LAYERS)
    ]
    assert not torch.equal(output(compiled(model), text()), output(model, text()))


def compiled_module(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def compiled_forward(model: nn.Module) -> nn.Module:
    model.forward = torch.compile(model.forward, backend="eager")  # type: ignore[method-assign]
    return model


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("how", [compiled_module, compiled_forward, compiled_in_place])
def test_a_model_that_is_compiled_already(how: Any, reference: nbl.Plan) -> None:
    model = how(tiny(layers=1))
    output(model, text())
    assert calibrated(model).digest == reference.digest


# What is shown and left behind.


def test_progress_is_shown_only_when_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    calibrated(tiny(layers=1))
    assert capfd.readouterr() == ("", "")
    nbl.calibrate(tiny(layers=1), texts(), progress=True)
    shown = capfd.readouterr().err
    assert "calibrating" in shown
    assert "3/3" in shown
    assert "576 tokens" in shown


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_holds_the_moments_afterwards(fails: bool) -> None:
    def alive() -> int:
        gc.collect()
        return sum(type(o) in (Moments, BufferedMoments) for o in gc.get_objects())

    model, batches, before = tiny(layers=1), texts(), alive()
    if fails:
        batches[-1] = text() + 1000  # no such token
        with pytest.raises(IndexError):
            nbl.calibrate(model, batches, progress=False)
    else:
        nbl.calibrate(model, batches, progress=False)
    assert alive() == before


def test_calibration_uses_up_none_of_the_models_recompilations() -> None:
    model = tiny(layers=1)
    shapes = [text(batch, length) for batch in (1, 2, 5) for length in (8, 33, 64)]
    nbl.calibrate(model, shapes, progress=False)
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        output(compiled(model), text())


def test_every_process_gets_the_same_answer_for_the_same_weights() -> None:
    """The plan names each site's weights by their place in the fingerprint."""
    model = tiny()
    plan = calibrated(model)
    for i, site in enumerate(plan.sites):
        shapes = [plan.fingerprint[k].shape for k in site.details["weights"]]
        own = [tuple(p.shape) for p in model.model.layers[i].self_attn.parameters()]
        assert sorted(shapes) == sorted(own)
        assert site.details["parameters"] == sum(
            p.numel() for p in model.model.layers[i].self_attn.parameters()
        )
