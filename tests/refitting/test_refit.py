"""``nbl.refit`` on tiny models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.tiny import compiled, output, text, tiny
from torch import Tensor, nn

import nbl_compiler as nbl
from nbl_compiler.errors import CalibrationError, ConfigError, InferenceOnlyError
from nbl_compiler.held_back import all_but_last
from nbl_compiler.plans import Plan
from nbl_compiler.refitting import refit_plan
from nbl_compiler.refitting.regression import RIDGES
from nbl_compiler.trial_text import MOST_KINDS, Part, few_rows, kinds_of_text

# Mean squared differences of logits, through float32.
ROUNDING = 1e-6
FORMS = {
    "maps": nbl.Config(nbl.Attention(layers=(0, 1, 2))),
    "maps of the residual stream": nbl.Config(nbl.Attention(layers=(0, 2), input="residual")),
    "maps with states": nbl.Config(nbl.Attention(layers=(0, 1, 2), taps=1)),
    "mixed values": nbl.Config(nbl.Attention(layers=(0, 1, 2), mixed=True)),
    "kept neurons": nbl.Config(None, nbl.FFN(layers=(0, 1, 2), keep=0.25)),
    "folded whole": nbl.Config(None, nbl.FFN(layers=(0, 1, 2), keep=0.0)),
    "guarded": nbl.Config(
        None, nbl.FFN(layers=(0, 1, 2), keep=0.125, guard="predicted", capacity=0.1)
    ),
    "both": nbl.Config(nbl.Attention(layers=(0, 2)), nbl.FFN(layers=(0, 1, 2), keep=0.25)),
}


def batches() -> list[Tensor]:
    return [text(batch=8, length=64, seed=seed) for seed in range(6)]


def disturbance(model: nn.Module, plan: Plan, ids: Tensor) -> float:
    """Return the divergence of a compiled plan's predictions from the dense model's, in nats."""
    dense = output(model, ids).log_softmax(-1)
    planned = output(compiled(model, plan=plan), ids).log_softmax(-1)
    return float((dense.exp() * (dense - planned)).sum(-1).mean())


def held_back(model: nn.Module, plan: Plan) -> list[list[Part]]:
    """Return the kinds of text that the plan is tried on: of FFNs alone, text as it is."""
    aside: list[dict[str, Tensor]] = []
    used = list(all_but_last(model, batches(), aside))
    assert len(used) + len(aside) == len(batches())
    attention = any(site.kind == "attention" for site in plan.rewritten)
    return kinds_of_text(model, aside) if attention else [few_rows(model, aside)]


def disturbance_of_parts(model: nn.Module, plan: Plan, parts: list[Part]) -> float:
    """Return the same over the positions of held-back text that are compared."""
    total, count = 0.0, 0
    for part in parts:
        dense, planned = (
            output(run, **part.inputs).log_softmax(-1).flatten(0, 1)
            for run in (model, compiled(model, plan=plan))
        )
        losses = (dense.exp() * (dense - planned)).sum(-1)
        if part.keep is not None:
            losses = losses[part.keep(len(dense))]
        total, count = total + float(losses.sum()), count + losses.numel()
    return total / count


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("llama", "mixed values"),
        ("llama", "folded whole"),
        ("llama", "guarded"),
        ("gemma3", "both"),
        *(
            pytest.param("llama", form, marks=pytest.mark.thorough)
            for form in (
                "maps",
                "maps of the residual stream",
                "maps with states",
                "kept neurons",
                "both",
            )
        ),
    ],
)
def test_the_loss_on_text_that_no_map_was_fitted_on_does_not_rise(name: str, form: str) -> None:
    model = tiny(name, layers=3)
    plan = nbl.calibrate(model, batches(), FORMS[form], progress=False)
    made = nbl.refit(model, plan, batches(), progress=False)
    facts = made.config["refit"]
    assert facts["loss_after"] < facts["loss_before"]
    assert [site.name for site in made.sites] == [site.name for site in plan.sites]
    anew = [site for site in made.rewritten if "refit_strength" in site.details]
    assert anew
    for site in anew:
        old = plan.site(site.name)
        assert {k: t.shape for k, t in site.tensors.items()} == {
            k: t.shape for k, t in old.tensors.items()
        }
        assert not torch.equal(site.tensors["weight"], old.tensors["weight"])
        assert 0 <= site.nmse < float("inf")
        assert site.details["refit_ridge"] in RIDGES
    # The trial's figures are those of the compiled model: the last batch was held back for it.
    kinds = held_back(model, plan)
    assert len(kinds) == (MOST_KINDS if FORMS[form].attention else 1)
    for wanted, one in ((facts["loss_before"], plan), (facts["loss_after"], made)):
        worst = max(disturbance_of_parts(model, one, parts) for parts in kinds)
        assert worst == pytest.approx(wanted, rel=1e-3)


def shifted(plan: Plan, name: str, by: Tensor) -> Plan:
    """Return the plan with another bias at one site."""
    sites = [
        replace(s, tensors={**s.tensors, "bias": s.tensors["bias"] + by}) if s.name == name else s
        for s in plan.sites
    ]
    return replace(plan, sites=tuple(sites))


def test_a_site_puts_back_what_one_in_front_of_it_lost() -> None:
    """The first FFN keeps all its neurons, so it stays as it is: wrong by a constant."""
    model = tiny("llama", layers=3)
    all_kept = nbl.calibrate(
        model, batches(), nbl.Config(None, nbl.FFN(layers=(0,), keep=1.0)), progress=False
    )
    folded = nbl.calibrate(
        model, batches(), nbl.Config(None, nbl.FFN(layers=(1,), keep=0.5)), progress=False
    )
    first, second = all_kept.sites[0], folded.sites[1]
    plan = Plan((first, second, *folded.sites[2:]), folded.fingerprint, folded.model)
    shift = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    wrong = shifted(plan, first.name, shift)
    made = nbl.refit(model, wrong, batches(), progress=False)
    assert made.site(first.name).tensors is wrong.site(first.name).tensors
    site = made.site(second.name)
    assert site.details["refit_strength"] == 1.0
    ids = text(seed=50)
    before, after, right = (disturbance(model, p, ids) for p in (wrong, made, plan))
    assert after < 0.75 * before  # what attention between them made of the shift remains
    assert right < before


def test_exact_maps_stay_exact() -> None:
    """Attention that is linear in what its map reads: a refit has nothing to gain."""
    model = tiny("llama", layers=3)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if "q_proj" in path:
                weight.zero_()
    config = nbl.Config(nbl.Attention(layers=(0, 1, 2), taps=1), ridge=0.0)
    plan = nbl.calibrate(model, batches(), config, progress=False)
    made = nbl.refit(model, plan, batches(), progress=False)
    ids = text(seed=50)
    assert disturbance(model, made, ids) < ROUNDING


def test_an_interrupted_run_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama", layers=3)
    plan = nbl.calibrate(model, batches(), FORMS["both"], progress=False)
    whole = nbl.refit(model, plan, batches(), progress=False)
    candidates = refit_plan._candidates
    calls: list[str] = []

    def until_the_third(*args: object) -> object:
        calls.append(str(args[2]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return candidates(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(refit_plan, "_candidates", until_the_third)
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        nbl.refit(model, plan, batches(), folder=folder, progress=False)
    assert len(list(folder.glob("after-*/*.pt"))) == len(list(folder.glob("after-002/*.pt"))) > 0
    with pytest.raises(ConfigError, match="another plan, text or options"):
        nbl.refit(model, plan, batches(), folder=folder, ridge=1.0, progress=False)
    monkeypatch.setattr(refit_plan, "_candidates", lambda *a: calls.append("on") or candidates(*a))
    calls.clear()
    resumed = nbl.refit(model, plan, batches(), folder=folder, progress=False)
    assert len(calls) == 3  # of five
    assert resumed.digest == whole.digest
    assert not folder.exists()


def test_padding_counts_for_nothing() -> None:
    model = tiny("llama", layers=2)
    config = nbl.Config(None, nbl.FFN(layers=(0, 1), keep=0.25))
    plan = nbl.calibrate(model, batches(), config, progress=False)
    plain = [{"input_ids": b, "attention_mask": torch.ones_like(b)} for b in batches()]
    padded = [
        {k: torch.nn.functional.pad(v, (5, 0)) for k, v in batch.items()} for batch in plain[:2]
    ]
    ridge = 0.0
    one = nbl.refit(model, plan, plain, ridge=ridge, progress=False)
    two = nbl.refit(model, plan, [*padded, *plain[2:]], ridge=ridge, progress=False)
    changed = [s.name for s in one.rewritten if "refit_strength" in s.details]
    assert changed
    for name in changed:
        weights = [p.site(name).tensors["weight"] for p in (one, two)]
        scale = float(weights[0].abs().max())
        assert float((weights[0] - weights[1]).abs().max()) < 1e-2 * scale


def test_what_cannot_be_refitted_is_said(tmp_path: Path) -> None:
    model = tiny("llama", layers=2)
    all_kept = nbl.calibrate(
        model, batches(), nbl.Config(None, nbl.FFN(layers=(0,), keep=1.0)), progress=False
    )
    with pytest.raises(CalibrationError, match="all its neurons are kept"):
        nbl.refit(model, all_kept, batches(), progress=False)
    (tmp_path / "mine").write_text("mine")
    plan = nbl.calibrate(model, batches(), nbl.Config(), progress=False)
    with pytest.raises(ConfigError, match="not empty"):
        nbl.refit(model, plan, batches(), folder=tmp_path, progress=False)
    assert (tmp_path / "mine").read_text() == "mine"
    model.train()
    with pytest.raises(InferenceOnlyError, match="eval"):
        nbl.refit(model, plan, batches(), progress=False)


def test_certified_guards_stay_as_they_are() -> None:
    model = tiny("opt", layers=2)
    config = nbl.Config(
        nbl.Attention(layers=(0,)), nbl.FFN(layers=(0,), keep=0.0, guard="exact", capacity=0.5)
    )
    plan = nbl.calibrate(model, batches(), config, progress=False)
    made = nbl.refit(model, plan, batches(), progress=False)
    (guarded,) = (site for site in made.rewritten if site.kind == "ffn")
    assert guarded is plan.site(guarded.name)
    assert "refit" in made.config
