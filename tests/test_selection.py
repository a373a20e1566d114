"""Which attention sites a plan linearizes: ``count``, ``layers``, ``max_nmse`` and the default."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from helpers.tiny import config, texts, tiny
from torch import Tensor

import nbl_compiler as nbl
from nbl_compiler.calibration import Calibrated, observe_model
from nbl_compiler.errors import ConfigError


@pytest.fixture(scope="module")
def four_sites() -> Calibrated:
    return observe_model(tiny(layers=4), texts(), config(), progress=False)


def chosen(found: Calibrated, **attention: Any) -> list[int]:
    sites = found.plan(nbl.Attention(**attention)).sites
    return [i for i, site in enumerate(sites) if site.decision == "rewritten"]


def order(found: Calibrated, rank_by: str = "nmse") -> list[int]:
    scores = [c.fit.holdout_nmse if rank_by == "nmse" else c.cca_bound for c in found.candidates]
    return sorted(range(4), key=scores.__getitem__)


@pytest.mark.parametrize("rank_by", ["nmse", "cca"])
@pytest.mark.parametrize("count", range(5))
def test_count_takes_the_best_by_the_ranking(
    four_sites: Calibrated, count: int, rank_by: str
) -> None:
    best = sorted(order(four_sites, rank_by)[:count])
    assert chosen(four_sites, count=count, rank_by=rank_by) == best


def test_the_default_is_the_best_quarter(four_sites: Calibrated) -> None:
    assert chosen(four_sites) == order(four_sites)[:1]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ((1, 3), [1, 3]),
        ((-1, 0), [0, 3]),
        ([2, "model.layers.0.self_attn"], [0, 2]),
        ((2, 2, -2), [2]),
        ((), []),
    ],
)
def test_layers_takes_exactly_these(
    four_sites: Calibrated, layers: Any, expected: list[int]
) -> None:
    assert chosen(four_sites, layers=layers) == expected
    reasons = {s.reason for s in four_sites.plan(nbl.Attention(layers=layers)).sites}
    assert reasons <= {"named in `layers`", "not in `layers`"}


def test_max_nmse_bounds_every_choice(four_sites: Calibrated) -> None:
    ranking = order(four_sites)
    errors = [c.fit.holdout_nmse for c in four_sites.candidates]
    between = (errors[ranking[1]] + errors[ranking[2]]) / 2
    within = sorted(ranking[:2])
    assert chosen(four_sites, max_nmse=between) == within
    assert chosen(four_sites, max_nmse=between, count=4) == within
    assert chosen(four_sites, max_nmse=between, count=1) == ranking[:1]
    assert chosen(four_sites, max_nmse=between, layers=range(4)) == within
    assert chosen(four_sites, max_nmse=1e-9) == []
    plan = four_sites.plan(nbl.Attention(max_nmse=between))
    assert f"exceeds max_nmse={between:g}" in plan.sites[ranking[3]].reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (4,)}, "layers holds 4, but the model has 4 sites"),
        ({"layers": (-5,)}, "layers holds -5, but the model has 4 sites"),
        ({"layers": ("model.layers.9.self_attn",)}, "layers names 'model.layers.9.self_attn'"),
        ({"count": 5}, "count=5 exceeds the 4 attention sites"),
        ({"input": "residual"}, "input='residual' was not observed"),
    ],
)
def test_sites_that_do_not_exist(
    four_sites: Calibrated, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        four_sites.plan(nbl.Attention(**options))


def test_a_wrong_choice_is_reported_after_the_first_batch() -> None:
    seen = []

    def batches() -> Iterator[Tensor]:
        for batch in texts(5):
            seen.append(batch)
            yield batch

    with pytest.raises(ConfigError, match="layers holds 7, but the model has 2 sites"):
        nbl.calibrate(tiny(), batches(), config(layers=(7,)), progress=False)
    assert len(seen) == 1


def test_a_kept_site_says_its_rank_and_errors(four_sites: Calibrated) -> None:
    plan = four_sites.plan(nbl.Attention(count=1))
    for position, index in enumerate(order(four_sites), start=1):
        site = plan.sites[index]
        assert site.reason == f"rank {position} of 4 by nmse"
        assert 0 < site.nmse < site.holdout_nmse * 1.5
        assert site.cca_bound > 0
        assert bool(site.tensors) == (position == 1)
    assert json.loads(json.dumps(plan.config))["attention"]["count"] == 1
    assert "rank 1 of 4" in str(plan)
