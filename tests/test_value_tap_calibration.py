"""Fitting maps that read value states."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.tiny import calibrated, compiled, config, output, text, texts, tiny
from torch import nn
from torch.fx import Node

import nbl_compiler as nbl
from nbl_compiler.calibration import observe_model
from nbl_compiler.errors import CalibrationError
from nbl_compiler.passes import match_attention
from nbl_compiler.passes.graph_tools import shape_of
from nbl_compiler.plan_file import VERSION, from_bytes, to_bytes
from nbl_compiler.plans import Plan
from nbl_compiler.value_states import states_of

# Float32 rounding of a whole tiny model, relative to its largest output, and of two maps solved
# without a ridge: up to 4e-5, by how the machine's products round.
LOGIT_TOLERANCE = 1e-4
EXACT = 1e-6


def attending_to_all_alike(name: str = "llama") -> nn.Module:
    """Return a tiny model whose queries are zero: attention is the mean of the values."""
    model = tiny(name)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if "q_proj" in path or "q_norm" in path:
                weight.zero_()
    return model


def padded(seed: int = 0) -> dict[str, torch.Tensor]:
    """Return a batch with left padding."""
    ids = text(seed=seed)
    mask = torch.ones_like(ids)
    for row, count in enumerate((0, 3, 11, 30)):
        ids[row, :count], mask[row, :count] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral"])
def test_uniform_attention_is_recovered(name: str) -> None:
    """Over whole documents, and over sliding windows: the mean is a state."""
    model = attending_to_all_alike(name)
    plan = calibrated(model, layers=(0, 1), taps=1, ridge=0.0)
    assert all(site.holdout_nmse < EXACT for site in plan.rewritten)
    assert all(states_of(site.details).averages for site in plan.rewritten)
    ids = text(seed=9)
    dense = output(model, ids)
    error = (output(compiled(model), ids) - dense).abs().max() / dense.abs().max()
    assert error < LOGIT_TOLERANCE
    without = calibrated(model, layers=(0, 1), taps=1, averages=False, ridge=0.0)
    assert all(site.holdout_nmse > 0.1 for site in without.rewritten)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_attention_over_distances_is_recovered(name: str) -> None:
    """Equal weights of all positions, of which the first, the oldest in reach, has no value."""
    model = attending_to_all_alike(name)
    with torch.no_grad():
        model.get_input_embeddings().weight[1] = 0
    batches = [text(length=7, seed=seed) for seed in range(30)]  # within a sliding window
    for ids in batches:
        ids[:, 0] = 1
    options = config(layers=(0, 1), mixed=True, ridge=0.0)
    plan = nbl.calibrate(model, batches, options, progress=False)
    assert all(site.holdout_nmse < EXACT for site in plan.rewritten)
    # The first token's stream is zero: its norm would blow rounding up.
    dense, ours = (output(run, batches[0])[:, 1:] for run in (model, compiled(model)))
    assert (ours - dense).abs().max() / dense.abs().max() < LOGIT_TOLERANCE


def test_gates_bring_the_map_closer() -> None:
    model = tiny()
    batches = [text(batch=16, length=64, seed=seed) for seed in range(6)]
    plain, mixed = (
        nbl.calibrate(model, batches, config(layers=(0, 1), mixed=on), progress=False)
        for on in (False, True)
    )
    for without, site in zip(plain.rewritten, mixed.rewritten, strict=True):
        assert site.holdout_nmse < 0.9 * without.holdout_nmse
        assert set(site.tensors) == {"weight", "bias", "mix", "gates", "gate_offsets"}
        own = sum(tensor.numel() for tensor in site.tensors.values())
        assert site.details["parameters_read"] == own + site.details["value_parameters"]
        assert site.reason.endswith("reads mixed values")


def test_padding_is_no_part_of_any_average() -> None:
    model = attending_to_all_alike()
    options = config(layers=(0, 1), taps=1, ridge=0.0)
    plan = nbl.calibrate(model, [padded(0), padded(1), text(seed=2)], options, progress=False)
    assert all(site.holdout_nmse < EXACT for site in plan.rewritten)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("bert", "not causal"), ("t5", "not causal"), ("deepseek_v3", "in several steps")],
)
def test_where_there_can_be_no_states_the_map_goes_without(name: str, reason: str) -> None:
    model = tiny(name)
    batches = [text(length=20, seed=seed) for seed in range(3)]
    given = [{"input_ids": b, "decoder_input_ids": b} if name == "t5" else b for b in batches]
    plan, plain = (
        nbl.calibrate(model, given, config(layers=(0,), taps=taps), progress=False)
        for taps in (2, 0)
    )
    (site,), (wanted,) = plan.rewritten, plain.rewritten
    assert reason in site.details["no_states"]
    assert set(site.tensors) == {"weight", "bias"}
    assert torch.equal(site.tensors["weight"], wanted.tensors["weight"])


def test_without_taps_nothing_changes() -> None:
    model = tiny()
    plain, other = (calibrated(model, averages=averages).rewritten for averages in (True, False))
    assert [site.name for site in plain] == [site.name for site in other]
    for one, two in zip(plain, other, strict=True):
        assert set(one.tensors) == set(two.tensors) == {"weight", "bias"}
        assert torch.equal(one.tensors["weight"], two.tensors["weight"])
        assert "taps" not in one.details


def test_states_have_to_earn_their_place() -> None:
    """Each row repeats one token: whatever attention looks at, x says it all."""
    model = tiny()
    rows = torch.arange(5, 60)[:, None].expand(-1, 20)
    options = config(layers=(0,), taps=2, holdout=0.3, ridge=0.0)
    (site,) = nbl.calibrate(model, [rows], options, progress=False).rewritten
    assert not states_of(site.details)
    assert site.nmse < EXACT


def test_batches_have_to_agree_on_whether_there_are_states(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = match_attention.find_value_path

    def only_in_short_rows(hidden: Node, *rest: Any) -> Any:
        return "hidden here" if shape_of(hidden)[1] == 40 else find(hidden, *rest)

    monkeypatch.setattr(match_attention, "find_value_path", only_in_short_rows)
    with (
        torch._dynamo.config.patch(automatic_dynamic_shapes=False),
        pytest.raises(CalibrationError, match=r"\(hidden here\); give batches of one kind"),
    ):
        nbl.calibrate(tiny(), [text(length=20), text(length=40)], config(taps=1), progress=False)


def test_a_plan_with_states_has_a_version_of_its_own() -> None:
    """Releases that know no states must not apply half of such a map."""
    model = attending_to_all_alike()
    plans = ((calibrated(model), 1, 3), (calibrated(model, taps=1), 2, 3))
    for plan, without, version in (*plans, (calibrated(model, mixed=True), VERSION, VERSION)):
        without_peaks = tuple(replace(sketch, peaks=None) for sketch in plan.fingerprint)
        older = replace(plan, fingerprint=without_peaks)
        assert f'\\"version\\": {without}'.encode() in to_bytes(older)
        assert f'\\"version\\": {version}'.encode() in to_bytes(plan)
        assert from_bytes(to_bytes(older)).digest == older.digest


def test_parameters_read_count_the_values() -> None:
    model = attending_to_all_alike()
    site = calibrated(model, taps=1, count=1).rewritten[0]
    values = model.model.layers[0].self_attn.v_proj
    own = sum(tensor.numel() for tensor in site.tensors.values())
    assert site.details["value_parameters"] == sum(p.numel() for p in values.parameters())
    assert site.details["parameters_read"] == own + site.details["value_parameters"]
    assert "averages" in site.reason


def test_one_calibration_serves_plans_with_other_choices() -> None:
    model = tiny()
    options = config(count=1, taps=1)
    found = observe_model(model, texts(), options, progress=False)
    attention = options.attention
    assert attention is not None
    both = found.plan(replace(attention, count=2))
    assert isinstance(both, Plan)
    assert len(both.rewritten) == 2
