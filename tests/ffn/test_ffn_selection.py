"""Which FFNs a plan folds: ``count``, ``layers``, ``max_nmse`` and the default."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
from helpers.ffn_surgery import LAYOUTS, FoldedFFN, read_weights
from helpers.own_ffn import (
    compiled_ffn,
    ffn_config,
    own_model,
    rows,
    stream,
)

import nbl_compiler as nbl
from nbl_compiler.calibration import Calibrated, observe_model
from nbl_compiler.errors import (
    ConfigError,
)

# Float32 rounding of four small FFNs on a residual stream of order one.
ROUNDING = {"atol": 2e-5, "rtol": 2e-5}


@pytest.fixture(scope="module")
def four_sites() -> Calibrated:
    return observe_model(
        own_model(False, True, False, True), stream(), ffn_config(keep=0.25), progress=False
    )


def choose(found: Calibrated, **options: Any) -> nbl.Plan:
    return found.plan(ffn=nbl.FFN(**{"keep": 0.25, "rank_by": "nmse", **options}))


def chosen(plan: nbl.Plan) -> list[int]:
    return [i for i, site in enumerate(plan.sites) if site.decision == "rewritten"]


def order(found: Calibrated) -> list[int]:
    return sorted(range(4), key=lambda i: found.fits[i].holdout_nmse)


@pytest.mark.parametrize("count", range(5))
def test_count_takes_the_best(four_sites: Calibrated, count: int) -> None:
    plan = choose(four_sites, count=count)
    assert chosen(plan) == sorted(order(four_sites)[:count])
    for rank, index in enumerate(order(four_sites), start=1):
        site = plan.sites[index]
        assert site.reason == f"rank {rank} of 4 by nmse"
        assert site.decision == ("rewritten" if rank <= count else "kept")
        assert bool(site.tensors) == (rank <= count)


def test_the_default_is_the_best_quarter(four_sites: Calibrated) -> None:
    assert chosen(choose(four_sites)) == order(four_sites)[:1]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [((1, 3), [1, 3]), ((-1, 0), [0, 3]), ([2, "layers.0"], [0, 2]), ((2, 2, -2), [2]), ((), [])],
)
def test_layers_takes_exactly_these(
    four_sites: Calibrated, layers: Any, expected: list[int]
) -> None:
    plan = choose(four_sites, layers=layers)
    assert chosen(plan) == expected
    for i, site in enumerate(plan.sites):
        assert site.reason == ("named in `layers`" if i in expected else "not in `layers`")


def test_max_nmse_bounds_every_choice(four_sites: Calibrated) -> None:
    ranking, errors = order(four_sites), [fit.holdout_nmse for fit in four_sites.fits]
    limit = (errors[ranking[1]] + errors[ranking[2]]) / 2
    within = sorted(ranking[:2])
    assert chosen(choose(four_sites, max_nmse=limit)) == within
    assert chosen(choose(four_sites, max_nmse=limit, count=4)) == within
    assert chosen(choose(four_sites, max_nmse=limit, count=1)) == ranking[:1]
    assert chosen(choose(four_sites, max_nmse=limit, layers=range(4))) == within
    assert chosen(choose(four_sites, max_nmse=1e-9)) == []
    worst = choose(four_sites, max_nmse=limit).sites[ranking[3]]
    assert worst.reason == f"held-out NMSE {errors[ranking[3]]:.3f} exceeds max_nmse={limit:g}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (4,)}, "layers holds 4, but the model has 4 sites"),
        ({"layers": (-5,)}, "layers holds -5, but the model has 4 sites"),
        ({"layers": ("layers.9",)}, "layers names 'layers.9', .*; sites: layers.0, layers.1"),
        ({"count": 5}, "count=5 exceeds the 4 FFN sites"),
    ],
)
def test_sites_that_do_not_exist(
    four_sites: Calibrated, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        choose(four_sites, **options)


@pytest.mark.parametrize(
    "options", [{"keep": 0.5}, {"guard": "predicted"}, {"capacity": 0.5}, {"rank": 3}]
)
def test_another_form_must_be_calibrated(four_sites: Calibrated, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="was not fitted; calibrate with it"):
        choose(four_sites, **options)


def test_only_the_chosen_sites_change_the_model(four_sites: Calibrated) -> None:
    model = own_model(False, True, False, True)
    with torch.no_grad():
        made = compiled_ffn(model, choose(four_sites, layers=(1,)))(rows())
        stream_ = rows()
        for i, layer in enumerate(model.layers):
            if i == 1:
                site = choose(four_sites, layers=(1,)).sites[1]
                layout = LAYOUTS["own gated"]
                layer = FoldedFFN(site, read_weights(layer, layout), layout.activation)
            stream_ = stream_ + layer(stream_)
    torch.testing.assert_close(made, stream_, **ROUNDING)
