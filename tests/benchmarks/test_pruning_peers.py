"""Wanda, RIA, magnitude and FLAP on a tiny model: what goes, what stays, what takes its place."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import texts, tiny
from models.architectures import FFN_WIDTH, inputs, make
from peers.does_not_apply import DoesNotApply
from peers.ffn_inputs import visit_ffns
from peers.ffn_modules import find_ffns
from peers.flap import flap
from peers.magnitude import magnitude
from peers.ria import ria
from peers.ria import score as ria_score
from peers.structured import keep_neurons
from peers.wanda import score as wanda_score
from peers.wanda import wanda
from torch import Tensor, nn

from nbl_compiler.shared_copy import shared_copy


def projections(model: nn.Module) -> dict[str, Tensor]:
    """Return path → weight of every FFN matrix."""
    return {
        f"{ffn.name}.{path}": ffn.linear(path).weight
        for ffn in find_ffns(model)
        for path in (*ffn.rows, ffn.down)
    }


def logits(model: nn.Module, name: str = "llama") -> Tensor:
    with torch.no_grad():
        made = model(**inputs(name))
    return made.logits if hasattr(made, "logits") else made.last_hidden_state


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt", "bert"])
def test_ffns_are_found_and_computed(name: str) -> None:
    model, seen = make(name), []

    def visit(ffn, x):
        module = ffn.linear(ffn.down)
        seen.append((ffn.hidden(x), module))

    read: list[Tensor] = []
    hooks = [
        f.linear(f.down).register_forward_pre_hook(lambda m, given: read.append(given[0]))
        for f in find_ffns(model)
    ]
    visit_ffns(model, [inputs(name)["input_ids"]], visit)
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(read) == 3
    for (hidden, _), given in zip(seen, read, strict=True):
        torch.testing.assert_close(hidden, given.flatten(0, -2))


def test_padding_tokens_are_never_seen() -> None:
    model, rows = make("bert"), []
    ids = inputs("bert", batch=2, length=10)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    short = {"input_ids": ids[:, :4], "attention_mask": mask[:, :4]}
    batches = [{"input_ids": ids, "attention_mask": mask}, short]
    visit_ffns(model, batches, lambda ffn, x: rows.append(len(x)))
    assert rows == [16 + 8] * 3


def test_a_model_without_known_ffns_is_refused() -> None:
    with pytest.raises(DoesNotApply, match="Linear has no FFN"):
        find_ffns(nn.Linear(2, 2))


def test_scores_by_hand() -> None:
    weight = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    norm = torch.tensor([4.0, 9.0])
    expected = torch.tensor([[4.0, 18.0], [12.0, 36.0]])
    torch.testing.assert_close(wanda_score(weight, norm), expected, rtol=0, atol=0)
    # columns add up to 4 and 6, rows to 3 and 7; norms enter by their square roots, 2 and 3
    by_column = torch.tensor([[1 / 4, 2 / 6], [3 / 4, 4 / 6]])
    by_row = torch.tensor([[1 / 3, 2 / 3], [3 / 7, 4 / 7]])
    expected = (by_column + by_row) * torch.tensor([2.0, 3.0])
    torch.testing.assert_close(ria_score(weight, norm), expected)


def test_wanda_keeps_as_many_in_every_row_and_the_best_of_the_first_layer() -> None:
    model, batches = tiny(), texts()
    before = {name: w.clone() for name, w in projections(model).items()}
    norms: list[Tensor] = []
    visit_ffns(model, batches, lambda ffn, x: norms.append(x.norm(dim=0)))
    pruned = projections(wanda(model, batches, 0.5))
    for name, weight in pruned.items():
        assert ((weight != 0).sum(1) == weight.shape[1] // 2).all()
        kept = weight != 0
        assert torch.equal(weight[kept], before[name][kept])
        assert torch.equal(projections(model)[name], before[name])  # the model itself is as it was
    # No pruned layer lies before the first: its scores are those of the dense model.
    gate = before["model.layers.0.mlp.gate_proj"]
    scores = gate.abs() * norms[0]
    stays = pruned["model.layers.0.mlp.gate_proj"] != 0
    least = scores.masked_fill(~stays, torch.inf).amin(1)
    assert (least >= scores.masked_fill(stays, 0).amax(1)).all()


def test_later_layers_are_scored_on_what_pruned_ones_leave() -> None:
    model, batches = tiny(), texts()
    alone = shared_copy(model)
    first, second = find_ffns(wanda(model, batches, 0.75))
    target = find_ffns(alone)[0]
    for path in (*target.rows, target.down):
        target.linear(path).weight = nn.Parameter(first.linear(path).weight)
    read: list[Tensor] = []
    visit_ffns(alone, batches, lambda ffn, x: read.append(x))
    scores = wanda_score(find_ffns(model)[1].linear("up_proj").weight, read[1].norm(dim=0))
    stays = second.linear("up_proj").weight != 0
    least = scores.masked_fill(~stays, torch.inf).amin(1)
    assert (least >= scores.masked_fill(stays, 0).amax(1)).all()


def test_ria_keeps_as_many_of_the_matrix() -> None:
    model = tiny()
    for weight in projections(ria(model, texts(), 0.25)).values():
        assert int((weight == 0).sum()) == weight.numel() // 4


@pytest.mark.parametrize("recipe", [wanda, ria])
def test_nothing_pruned_is_the_dense_model(recipe) -> None:
    model = tiny()
    torch.testing.assert_close(logits(recipe(model, texts(), 0.0)), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_cutting_neurons_equals_setting_them_to_zero(name: str) -> None:
    model = make(name)
    kept = torch.arange(0, FFN_WIDTH, 3)
    gone = torch.ones(FFN_WIDTH, dtype=torch.bool)
    gone[kept] = False
    cut, zeroed = shared_copy(model), shared_copy(model)
    for ffn in find_ffns(cut):
        keep_neurons(ffn, kept)
        assert ffn.neurons == len(kept)
    for ffn in find_ffns(zeroed):
        down = ffn.linear(ffn.down)
        down.weight = nn.Parameter(down.weight.detach().masked_fill(gone, 0.0))
    torch.testing.assert_close(logits(cut, name), logits(zeroed, name))


def test_magnitude_drops_the_smallest_neurons() -> None:
    model = tiny(layers=1)
    (ffn,) = find_ffns(model)
    small = torch.tensor([3, 10, 40])
    with torch.no_grad():
        for path in ffn.rows:
            ffn.linear(path).weight[small] *= 1e-3
        ffn.linear(ffn.down).weight[:, small] *= 1e-3
    (cut,) = find_ffns(magnitude(model, 3 / FFN_WIDTH))
    rest = torch.tensor([i for i in range(FFN_WIDTH) if i not in small])
    assert torch.equal(cut.linear("up_proj").weight, ffn.linear("up_proj").weight[rest])
    assert torch.equal(cut.linear("down_proj").weight, ffn.linear("down_proj").weight[:, rest])


def test_flaps_bias_stands_exactly_for_constant_neurons() -> None:
    """Plain FFN: with W1's row at zero a neuron is σ(b1), whatever the token."""
    model = make("opt", layers=1)
    constant = torch.arange(5, 20)
    with torch.no_grad():
        for ffn in find_ffns(model):
            first = ffn.linear("fc1")
            first.weight[constant] = 0.0
            first.bias[constant] = 1.0 + torch.arange(len(constant)) / 10  # σ is ReLU here
    batches = [inputs("opt", 4, 32, seed=s)["input_ids"] for s in range(2)]
    cut = flap(model, batches, len(constant) / FFN_WIDTH)
    assert [ffn.neurons for ffn in find_ffns(cut)] == [FFN_WIDTH - len(constant)]
    torch.testing.assert_close(logits(cut, "opt"), logits(model, "opt"))


def test_flap_spreads_over_layers_and_leaves_each_a_neuron() -> None:
    model = tiny()
    some = [ffn.neurons for ffn in find_ffns(flap(model, texts(), 0.5))]
    assert sum(some) == FFN_WIDTH  # half of two layers
    least = [ffn.neurons for ffn in find_ffns(flap(model, texts(), 1.0))]
    assert min(least) >= 1
    assert sum(least) <= 2
