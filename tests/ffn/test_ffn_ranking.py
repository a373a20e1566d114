"""``FFN(rank_by="loss")``: FFNs are chosen by what folding them does to the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.ffn_calibrating import FORMS
from helpers.own_ffn import compiled_ffn, ffn_config, own_model, stream
from helpers.tiny import compiled, output, texts, tiny
from torch import Tensor, nn

import nbl_compiler as nbl
from nbl_compiler.calibration import observe_model
from nbl_compiler.errors import ConfigError

# float32 forward passes of a tiny model, compared through a softmax
KL_ROUNDING = 1e-6


@pytest.mark.parametrize(
    ("name", "form"),
    [("llama", {"keep": 0.25}), ("llama", FORMS["predicted"]), ("gpt2", FORMS["exact"])],
)
def test_the_loss_of_a_site_is_the_divergence_its_fold_causes(
    name: str, form: dict[str, Any]
) -> None:
    model, batches = tiny(name), texts()
    config = nbl.Config(attention=None, ffn=nbl.FFN(count=1, **form))
    found = observe_model(model, batches, config, progress=False)
    losses = []
    for site in found.plan().sites:
        alone = found.plan(ffn=nbl.FFN(layers=(site.name,), **form))
        with torch.no_grad():
            dense, ours = (
                output(m, batches[-1], use_cache=False).log_softmax(-1)
                for m in (model, compiled(model, plan=alone))
            )
        expected = float((dense.exp() * (dense - ours)).sum(-1).mean())
        assert site.details["loss"] == pytest.approx(expected, abs=KL_ROUNDING)
        losses.append(expected)
    assert losses[0] != pytest.approx(losses[1], abs=10 * KL_ROUNDING)
    assert [s.decision == "rewritten" for s in found.plan().sites] == [
        loss == min(losses) for loss in losses
    ]
    assert "of 2 by loss" in found.plan().sites[0].reason


class Beside(nn.Module):
    """Two FFNs of one input; the first one's output is far the larger."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = own_model(False, False).layers
        with torch.no_grad():
            self.first.up.weight.mul_(0.3)  # nearly linear there

    def forward(self, x: Tensor) -> Tensor:
        return x + 100 * self.first(x) + self.second(x)


def test_a_layer_that_fits_well_but_matters_most_comes_last() -> None:
    for rank_by, best in (("nmse", "first"), ("loss", "second")):
        config = ffn_config(keep=0.25, count=1, max_nmse=None, rank_by=rank_by)
        plan = nbl.calibrate(Beside().eval(), stream(), config, progress=False)
        assert [site.name for site in plan.rewritten] == [best]


def test_the_loss_without_logits_is_the_relative_error_of_the_output() -> None:
    model, batches = own_model(False, True), stream()
    config = ffn_config(keep=0.25, count=1, max_nmse=None, rank_by="loss")
    (site,) = nbl.calibrate(model, batches, config, progress=False).rewritten
    plan = nbl.calibrate(
        model, batches[:-1], ffn_config(keep=0.25, layers=(site.name,)), progress=False
    )
    with torch.no_grad():
        dense, ours = model(batches[-1]), compiled_ffn(model, plan)(batches[-1])
    spread = (dense - dense.mean((0, 1))).square().sum()
    expected = float((dense - ours).square().sum() / spread)
    assert site.details["loss"] == pytest.approx(expected, rel=1e-4)


def test_a_choice_that_needs_trials_is_refused_without_them() -> None:
    found = observe_model(
        own_model(False, False), stream(), ffn_config(keep=0.25, rank_by="loss"), progress=False
    )
    assert len(found.plan().rewritten) == 2
    with pytest.raises(ConfigError, match=r"rank_by=.loss. was not measured; calibrate with it"):
        found.plan(ffn=nbl.FFN(count=1, keep=0.25))
