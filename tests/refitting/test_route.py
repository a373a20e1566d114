"""Running a graph in pieces gives what the whole model gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.ffn_surgery import LAYOUTS, fold_by_surgery
from helpers.tiny import text, texts, tiny
from torch import Tensor, nn

import nbl_compiler as nbl
from nbl_compiler.errors import CalibrationError, ConfigError
from nbl_compiler.refitting.refit_plan import _rows, _value
from nbl_compiler.refitting.regression import stand_in
from nbl_compiler.refitting.store import Store
from nbl_compiler.refitting.traced import Recorded, record

# Two orders of float32 summation in a tiny model, relative to its largest activation.
ROUNDING = 2e-5
LAYERS = 3
# Pre-norm, post-norm, both norms, attention beside the FFN, fused projections, an encoder.
FAMILIES = ("llama", "gemma3", "gpt2", "gpt_neox", "phi3", "opt", "bert")


def planned(name: str) -> tuple[nn.Module, nbl.Plan]:
    """Return a model and a plan that touches attention and FFNs of the first and last layer."""
    model = tiny(name, layers=LAYERS)
    taps = 0 if name == "bert" else 1
    config = nbl.Config(nbl.Attention(layers=(0, -1), taps=taps), nbl.FFN(layers=(0, 1), keep=0.25))
    return model, nbl.calibrate(model, texts(), config, progress=False)


def seen_by_last(model: nn.Module, plan: nbl.Plan, ids: Tensor) -> Tensor:
    """Return what the last planned site's module reads, in plain eager execution."""
    seen: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).detach())

    last = [site.name for site in plan.rewritten if site.kind == "attention"][-1]
    handle = model.get_submodule(last).register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        model(ids)
    handle.remove()
    return seen[0]


def run_through(
    batch: Recorded, plan: nbl.Plan, store: Store, *, stop: int
) -> tuple[dict[str, object], dict[str, object]]:
    """Go from place to place, through the disk each time."""
    places = batch.traced.places
    stand_ins = {p.site: stand_in(plan.site(p.site), p.weights) for p in places}
    dense, compressed = {}, {}
    starts = (0, 0)
    for place in places[: stop + 1]:
        dense, compressed = store.load(0, batch.inputs)
        dense = batch.traced.dense.advance(dense, batch.inputs, starts[0], place.end, {})
        compressed = batch.traced.compressed.advance(
            compressed, batch.inputs, starts[1], place.cut, stand_ins
        )
        store.save(0, (dense, compressed), batch.inputs)
        store.finish_site(plan, {})
        starts = (place.end, place.cut)
    return dense, compressed


@pytest.mark.parametrize("name", FAMILIES)
def test_both_routes_show_what_the_models_show(name: str, tmp_path: Path) -> None:
    model, plan = planned(name)
    ids = text(seed=7)
    (batch,) = record(model, plan, [{"input_ids": ids}])
    places = batch.traced.places
    assert [place.cut for place in places] == sorted(place.cut for place in places)
    assert {place.site for place in places} == {site.name for site in plan.rewritten}
    last = max(i for i, p in enumerate(places) if plan.site(p.site).kind == "attention")
    dense, compressed = run_through(batch, plan, Store(tmp_path / "run", "key"), stop=last)
    place = places[last]

    surgery = fold_by_surgery(model, plan, LAYOUTS[name])
    wanted = _rows(seen_by_last(surgery, plan, ids))
    width = wanted.shape[-1]  # value states stand behind it
    read = _rows(_value(place.read, compressed, batch.inputs))[:, :width]
    assert (read - wanted).abs().max() < ROUNDING * wanted.abs().max()

    if name != "bert":  # where the module's own output holds the residual, too
        with torch.no_grad():
            outputs: list[Tensor] = []
            module = model.get_submodule(place.site)
            handle = module.register_forward_hook(lambda *a: outputs.append(a[2][0]))
            model(ids)
            handle.remove()
        output = _rows(_value(place.output, dense, batch.inputs))
        assert (output - _rows(outputs[0])).abs().max() < ROUNDING * output.abs().max()


def test_nothing_is_kept_that_is_not_needed(tmp_path: Path) -> None:
    """Behind a layer the stream is enough: the inside of the next one is not computed before."""
    model, plan = planned("llama")
    ids = text(seed=7)
    (batch,) = record(model, plan, [{"input_ids": ids}])
    dense, compressed = run_through(batch, plan, Store(tmp_path / "run", "key"), stop=0)
    for values in (dense, compressed):
        floats = [v for v in values.values() if isinstance(v, Tensor) and v.is_floating_point()]
        assert sum(v.numel() for v in floats) < 12 * ids.numel() * model.config.hidden_size
        assert not any(isinstance(value, nn.Parameter) for value in values.values())


def test_views_of_parameters_are_not_written_to_disk(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.randn(6, 5))
    own = torch.randn(3)
    values = {"view": weight.detach()[1:4].T, "pair": (own, own[:2]), "number": 7}
    store = Store(tmp_path / "run", "key")
    store.save(4, (values, {}), {"weight": weight})
    store.finish_site(nbl.Plan(), {})
    back, other = store.load(4, {"weight": weight})
    assert other == {}
    assert back["number"] == 7
    assert torch.equal(back["view"], weight[1:4].T)
    assert back["view"].data_ptr() == weight[1:4].data_ptr()
    assert torch.equal(back["pair"][0], own)
    back["pair"][0][0] = 9.0  # what shared memory shares it again
    assert float(back["pair"][1][0]) == 9.0


def test_a_store_is_for_one_run(tmp_path: Path) -> None:
    store = Store(tmp_path / "run", "one")
    store.finish_site(nbl.Plan(), {"loss": 1.0})
    assert Store(tmp_path / "run", "one").done == 1
    with pytest.raises(ConfigError, match="another plan, text or options"):
        Store(tmp_path / "run", "two")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        Store(tmp_path, "one")


def test_the_whole_model_has_to_be_in_one_graph() -> None:
    model, plan = planned("llama")
    forward = model.model.layers[1].mlp.forward

    def broken(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return forward(x)

    model.model.layers[1].mlp.forward = broken
    with pytest.raises(CalibrationError, match="one graph"):
        record(model, plan, [{"input_ids": text()}])
