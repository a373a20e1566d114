"""TEAL, CATS and TARDIS as published, on tiny models."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import texts, tiny
from models.architectures import FFN_WIDTH, HIDDEN, inputs, make
from peers import cats, teal
from peers.does_not_apply import DoesNotApply
from peers.ffn_modules import find_ffns
from peers.tardis import tardis
from peers.thresholds import magnitude_quantile
from torch import Tensor, nn

import nbl_compiler as nbl


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**inputs("llama", 4, 32)).logits


def test_the_threshold_is_the_quantile_of_sizes() -> None:
    values = torch.tensor([-4.0, 1.0, -2.0, 3.0])
    assert magnitude_quantile(values, 0.5) == 2.0
    assert magnitude_quantile(values, 0.0) == 0.0
    assert magnitude_quantile(values, 1.0) == 4.0


@pytest.mark.parametrize("recipe", [teal.teal, cats.cats])
def test_no_sparsity_is_the_dense_model(recipe) -> None:
    model = tiny()
    torch.testing.assert_close(logits(recipe(model, texts(), 0.0)), logits(model), rtol=0, atol=0)


def read_by(model: nn.Module, path: str) -> list[Tensor]:
    """Return what each layer's projection of that path reads on the calibration text."""
    seen: list[Tensor] = []
    modules = [layer.mlp.get_submodule(path) for layer in model.model.layers]
    linears = [m[1] if isinstance(m, nn.Sequential) else m for m in modules]
    hooks = [m.register_forward_pre_hook(lambda m, given: seen.append(given[0])) for m in linears]
    with torch.no_grad():
        model(torch.cat(texts()))
    for hook in hooks:
        hook.remove()
    return seen


def test_teal_leaves_the_wanted_share_of_the_first_layers_input() -> None:
    """Later layers read what sparse ones made, on which thresholds were not taken."""
    sparse = teal.teal(tiny(), texts(), 0.6)
    for path in ("gate_proj", "up_proj"):
        first = read_by(sparse, path)[0]
        share = float((first == 0).double().mean())
        assert share == pytest.approx(0.6, abs=1 / HIDDEN)
    assert float((read_by(sparse, "down_proj")[0] == 0).double().mean()) > 0.4


def test_teal_is_the_dense_ffn_on_what_passes() -> None:
    model = tiny(layers=1)
    sparse = teal.teal(model, texts(), 0.5)
    x = torch.randn(7, HIDDEN)
    mlp, wrapped = model.model.layers[0].mlp, sparse.model.layers[0].mlp
    low, high = wrapped.gate_proj[0].threshold, wrapped.down_proj[0].threshold
    assert low > 0
    assert high > 0
    passed = x * (x.abs() > low)
    hidden = mlp.act_fn(mlp.gate_proj(passed)) * mlp.up_proj(passed)
    torch.testing.assert_close(wrapped(x), mlp.down_proj(hidden * (hidden.abs() > high)))


def test_cats_uses_the_largest_gates() -> None:
    model = tiny(layers=1)
    sparse = cats.cats(model, texts(), 0.7)
    x = torch.randn(7, HIDDEN)
    mlp, wrapped = model.model.layers[0].mlp, sparse.model.layers[0].mlp
    gate = mlp.act_fn(mlp.gate_proj(x))
    threshold = wrapped.act_fn[1].threshold
    expected = mlp.down_proj(gate * (gate.abs() > threshold) * mlp.up_proj(x))
    torch.testing.assert_close(wrapped(x), expected)
    hidden = read_by(sparse, "down_proj")[0]
    assert float((hidden == 0).double().mean()) == pytest.approx(0.7, abs=1 / FFN_WIDTH)


def test_bytes_that_their_kernels_would_leave_unread() -> None:
    model = tiny()
    matrix = HIDDEN * FFN_WIDTH
    assert teal.unread_parameters(model, 0.5) == 2 * 3 * matrix // 2  # two layers
    assert cats.unread_parameters(model, 0.5) == 2 * 2 * matrix // 2  # the gate is read whole


def test_tardis_folds_plain_ffns_without_a_certificate() -> None:
    model = make("opt")
    batches = [inputs("opt", 8, 64, seed=s)["input_ids"] for s in range(2)]
    plan = tardis(model, batches, 0.9)
    assert len(plan.rewritten) == len(find_ffns(model))
    for site in plan.rewritten:
        assert site.details["predictor"] == "quantized_2"
        assert "bound" not in site.tensors
    options = {"plan": plan, "lowering": "eager", "strict": True}
    with torch.no_grad():
        dense = model(batches[0]).logits
        made = torch.compile(model, backend="nbl", options=options)(batches[0]).logits
        torch._dynamo.reset()
        recipe = nbl.FFN(max_nmse=1e9, keep=0.0, guard="exact", coverage=0.9)
        exact = nbl.calibrate(model, batches, nbl.Config(None, recipe), progress=False)
        options = {**options, "plan": exact}
        certified = torch.compile(model, backend="nbl", options=options)(batches[0]).logits
    # A 2-bit predictor overlooks outliers, which the certified guard never does.
    lost, kept = ((one - dense).square().mean() for one in (made, certified))
    assert float(kept) < float(lost) < float(dense.var())


def test_tardis_leaves_gated_ffns_alone() -> None:
    with pytest.raises(DoesNotApply, match="plain FFNs only"):
        tardis(tiny(), texts(), 0.9)
