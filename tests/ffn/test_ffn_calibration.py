"""``nbl.calibrate`` for FFNs: what it sees, what it fits, what it chooses, whose plan it is.

``test_calibration`` has attention; ``solvers/`` the mathematics alone.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from helpers.ffn_calibrating import (
    assert_same_plan,
    dense_inputs,
    grid_model,
    nmse,
    on_a_grid,
    split_rows,
)
from helpers.ffn_surgery import LAYOUTS, FoldedFFN, read_weights
from helpers.own_ffn import (
    NEURONS,
    WIDTH,
    OwnModel,
    compiled_ffn,
    ffn_config,
    folded,
    own_model,
    rows,
    stream,
)
from helpers.tiny import compiled, output, text, texts, tiny
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader

import nbl_compiler as nbl
from nbl_compiler.calibration import Calibrated, observe_model
from nbl_compiler.errors import (
    CalibrationError,
    ConfigError,
    PlanMismatchError,
    WeightsReleasedError,
)

# Float32 rounding of products of other blocks, times the condition of the fit.
FIT_TOLERANCE = 1e-4
# The same where activations themselves are computed in other shapes, by a whole tiny model.
MODEL_TOLERANCE = 1e-3
# Float32 rounding of the moments that an error is computed from, relative to the error.
ERROR_TOLERANCE = 1e-4

FORMS: dict[str, dict[str, Any]] = {
    "folded": {"keep": 0},
    "kept": {"keep": 0.25},
    "predicted": {"keep": 0.25, "guard": "predicted", "capacity": 0.3},
    "predicted values": {"keep": 0, "guard": "predicted", "values": "predicted"},
    "exact": {"keep": 0.25, "guard": "exact"},
    "exact, 8 bits": {"keep": 0, "guard": "exact", "predictor": "quantized_8"},
}
OWN = [
    ("folded", True),
    ("kept", False),
    ("kept", True),
    ("predicted", True),
    ("predicted values", False),
    ("exact", False),
    ("exact, 8 bits", False),
]


# What is seen.


def grid_rows() -> Tensor:
    """Rows [12, 70, d]: a held-out block and a piece of one."""
    return on_a_grid(rows(12, 70, seed=3))


@cache
def in_one_batch(form: str, gated: bool) -> nbl.Plan:
    return folded(grid_model(gated), [grid_rows()], holdout=0.3, **FORMS[form])


@pytest.mark.parametrize(("form", "gated"), [("kept", True), ("predicted", True), ("exact", False)])
@settings(max_examples=2, phases=[Phase.generate])  # each example traces a model: no shrinking
@given(order=st.permutations(range(12)), cuts=st.sets(st.integers(1, 11), min_size=1, max_size=2))
def test_fits_do_not_depend_on_the_cuts(
    form: str, gated: bool, order: list[int], cuts: set[int]
) -> None:
    torch._dynamo.reset()
    parts = torch.tensor_split(grid_rows()[order], sorted(cuts))
    plan = folded(grid_model(gated), parts, holdout=0.3, **FORMS[form])
    assert_same_plan(plan, in_one_batch(form, gated), FIT_TOLERANCE)


def padded(side: str) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return a batch of rows of several lengths, padded with NaN, and the rows alone."""
    lengths = (70, 64, 33)
    alone = [on_a_grid(rows(1, n, seed=n)) for n in lengths]
    x = torch.full((len(lengths), max(lengths), WIDTH), float("nan"))
    mask = torch.zeros(x.shape[:2], dtype=torch.long)
    for i, row in enumerate(alone):
        n = row.shape[1]
        where = slice(0, n) if side == "right" else slice(x.shape[1] - n, None)
        x[i, where], mask[i, where] = row[0], 1
    return {"x": x, "attention_mask": mask}, alone


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("form", "gated"), [("kept", True), ("exact", False)])
def test_padding_never_enters(form: str, gated: bool, side: str) -> None:
    """Whatever it holds: here it would make every fit NaN."""
    batch, alone = padded(side)
    plan = folded(grid_model(gated), [batch], holdout=0.4, **FORMS[form])
    assert_same_plan(
        plan, folded(grid_model(gated), alone, holdout=0.4, **FORMS[form]), FIT_TOLERANCE
    )
    assert plan.sites[0].details["tokens"] == sum(row.shape[1] for row in alone)
    assert plan.sites[0].nmse != plan.sites[0].holdout_nmse


def test_padding_in_a_transformer() -> None:
    model, alone = tiny(layers=1), text(2, 70)
    ids, mask = text(2, 80, seed=99), torch.ones(2, 80, dtype=torch.long)
    ids[0, :70], mask[0, 70:] = alone[0], 0
    ids[1, 10:], mask[1, :10] = alone[1], 0
    batch = {"input_ids": ids, "attention_mask": mask}
    config = ffn_config(holdout=0.4, keep=0.25)
    plan = nbl.calibrate(model, [batch], config, progress=False)
    assert_same_plan(plan, nbl.calibrate(model, [alone], config, progress=False), MODEL_TOLERANCE)
    assert plan.sites[0].details["tokens"] == alone.numel()
    assert plan.sites[0].nmse != plan.sites[0].holdout_nmse


# Text that is gone through several times.


class ReadAgain:
    """An iterable that starts anew each time."""

    def __iter__(self) -> Iterator[Tensor]:
        yield from stream()


KINDS: dict[str, Callable[[], Any]] = {
    "tuple": lambda: tuple(stream()),
    "generator": lambda: (batch for batch in stream()),
    "iterator": lambda: iter(stream()),
    "map": lambda: map(torch.clone, stream()),
    "iterable": ReadAgain,
    "mappings": lambda: [{"x": batch} for batch in stream()],
    "data loader": lambda: DataLoader(torch.cat(stream()), batch_size=8),  # type: ignore[arg-type]
    "iterator of a data loader": lambda: iter(DataLoader(torch.cat(stream()), batch_size=8)),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_batches_gives_the_same_plan(kind: str) -> None:
    """Also those of an iterator, which are kept: calibration goes through them three times."""
    assert folded(own_model(False), KINDS[kind](), **FORMS["exact"]).digest == by_list().digest


@cache
def by_list() -> nbl.Plan:
    return folded(own_model(False), stream(), **FORMS["exact"])


class ReadOnce:
    """An iterable that is no iterator, and yet empty the second time.

    Args:
        same: Return the same iterator each time, not one around it.
    """

    def __init__(self, same: bool) -> None:
        self._batches, self._same = iter(stream()), same

    def __iter__(self) -> Iterator[Tensor]:
        return self._batches if self._same else itertools.chain(self._batches)


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("form", ["kept", "predicted", "exact"])
def test_batches_that_can_be_read_only_once_are_refused(form: str, same: bool) -> None:
    with pytest.raises(CalibrationError, match="only once"):
        folded(own_model(False), ReadOnce(same), **FORMS[form])


# What is fitted.


@pytest.mark.parametrize("gated", [False, True])
def test_without_a_ridge_the_fit_is_least_squares(gated: bool) -> None:
    """On training rows; kept are the neurons that x predicts worst; M, V, b are fitted at once."""
    model = own_model(gated)
    (site,) = folded(model, ridge=0.0, holdout=0.3, **FORMS["kept"]).sites
    weights = read_weights(model.layers[0], LAYOUTS["own gated" if gated else "own gelu"])
    x = training_rows(0.3)
    hidden = torch.nn.functional.gelu(x @ weights.w1.T + weights.b1)
    if weights.w_up is not None and weights.b_up is not None:
        hidden = hidden * (x @ weights.w_up.T + weights.b_up)
    y = hidden @ weights.w2.T + weights.b2
    one = torch.ones(len(x), 1, dtype=torch.float64)

    residual = least_squares(torch.cat([x, one], 1), hidden)[1]
    scores = residual.square().mean(0) * weights.w2.square().sum(0)
    kept = scores.topk(round(0.25 * NEURONS)).indices.sort().values
    assert torch.equal(site.tensors["kept"], kept)

    solution, error = least_squares(torch.cat([x, hidden[:, kept], one], 1), y)
    found = [site.tensors["weight"], site.tensors["down"], site.tensors["bias"][:, None]]
    torch.testing.assert_close(
        torch.cat(found, 1).double(), solution.T, rtol=0, atol=FIT_TOLERANCE * solution.abs().max()
    )
    assert site.nmse == pytest.approx(nmse(y - error, y), rel=ERROR_TOLERANCE)


def training_rows(holdout: float) -> Tensor:
    """The stream's tokens that are not held out, [tokens, d] float64."""
    split = split_rows(stream(), ffn_config(holdout=holdout), "x")
    parts = [
        batch.reshape(-1, WIDTH)[train] for batch, (train, _) in zip(stream(), split, strict=True)
    ]
    return torch.cat(parts).double()


def least_squares(regressors: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the solution [p, q] and the residuals [n, q]."""
    solution = torch.linalg.lstsq(regressors, targets).solution
    return solution, targets - regressors @ solution


@pytest.mark.parametrize(("form", "gated"), OWN)
def test_errors_are_those_of_the_folded_ffn(form: str, gated: bool) -> None:
    """Recomputed token by token, on the training and on the held-out rows of the dense model."""
    model = own_model(gated, gated)
    layout = LAYOUTS["own gated" if gated else "own gelu"]
    plan = folded(model, holdout=0.3, **FORMS[form])
    split = split_rows(stream(), ffn_config(holdout=0.3), "x")
    for i, (site, ffn) in enumerate(zip(plan.sites, model.layers, strict=True)):
        by_hand = FoldedFFN(site, read_weights(ffn, layout), layout.activation)
        dense = copy.deepcopy(ffn).double()
        read = [dense_inputs(model, batch)[i] for batch in stream()]
        for error, part in ((site.nmse, 0), (site.holdout_nmse, 1)):
            x = torch.cat([b[chosen[part]] for b, chosen in zip(read, split, strict=True)])
            assert len(x) >= 64
            with torch.no_grad():
                assert error == pytest.approx(nmse(by_hand(x), dense(x)), rel=ERROR_TOLERANCE)
        assert site.details["tokens"] == 3 * 8 * 64


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_errors_in_a_transformer(name: str) -> None:
    model = tiny(name)
    config = ffn_config(holdout=0.3, **FORMS["kept"])
    plan = nbl.calibrate(model, texts(), config, progress=False)
    split = split_rows(texts(), config, "input_ids")
    for site in plan.sites:
        seen: list[tuple[Tensor, Tensor]] = []
        module = model.get_submodule(site.name)

        def remember(_: nn.Module, args: tuple, y: Tensor, into: Any = seen) -> None:
            into.append((args[0].flatten(0, 1), y.flatten(0, 1)))

        handle = module.register_forward_hook(remember)
        for batch in texts():
            output(model, batch, use_cache=False)
        handle.remove()
        held = [(x[rows_[1]], y[rows_[1]]) for (x, y), rows_ in zip(seen, split, strict=True)]
        x, y = (torch.cat(parts) for parts in zip(*held, strict=True))
        layout = LAYOUTS[name]
        by_hand = FoldedFFN(site, read_weights(module, layout), layout.activation)
        with torch.no_grad():
            expected = nmse(by_hand(x), y)
        assert site.holdout_nmse == pytest.approx(expected, rel=10 * ERROR_TOLERANCE)


def test_without_held_out_rows_there_is_one_error() -> None:
    for form in FORMS:
        (site,) = folded(own_model(False), holdout=0.0, **FORMS[form]).sites
        assert 0 < site.nmse == site.holdout_nmse


def folded_preactivations(model: OwnModel, site: nbl.Site, x: Tensor) -> Tensor:
    weights = read_weights(model.layers[0], LAYOUTS["own gelu"])
    left = torch.ones(NEURONS, dtype=torch.bool)
    left[site.tensors.get("kept", torch.zeros(0, dtype=torch.int64))] = False
    return x @ weights.w1[left].T + weights.b1[left]


@pytest.mark.parametrize("coverage", [0.5, 0.9, 1.0])
def test_ranges_hold_the_share_that_was_asked_for(coverage: float) -> None:
    """Of the training rows' pre-activations, all folded neurons together."""
    model = own_model(False)
    (site,) = folded(model, holdout=0.3, coverage=coverage, **FORMS["exact"]).sites
    z = folded_preactivations(model, site, training_rows(0.3))
    low, high = site.tensors["low"].double(), site.tensors["high"].double()
    share = float(((z >= low) & (z <= high)).double().mean())
    # Ranges end at bins, and coverages come in steps of at most 0.05.
    assert coverage <= share <= coverage + 0.02
    if coverage == 1.0:
        few_bins = (z.amax(0) - z.amin(0)) / 64  # of 512 bins about half are in use, or more
        assert bool((z.amin(0) - low < few_bins).all())
        assert bool((high - z.amax(0) < few_bins).all())


def test_the_default_capacity_leaves_one_token_in_a_hundred_dense() -> None:
    """And what the plan says of the guard is what it does on the calibration text."""
    model = own_model(False)
    (site,) = folded(model, keep=0.25, guard="exact").sites
    layout = LAYOUTS["own gelu"]
    by_hand = FoldedFFN(site, read_weights(model.layers[0], layout), layout.activation)
    by_hand(torch.cat(stream()).double())
    flagged = torch.tensor([count for count, _ in by_hand.counts])
    needed = int(flagged.sort().values[-(-99 * len(flagged) // 100) - 1])
    assert site.details["capacity"] == min(-(-needed // 8) * 8, 18)  # full vectors of neurons
    assert site.details["outliers_per_token"] == pytest.approx(float(flagged.double().mean()))
    dense = sum(dense for _, dense in by_hand.counts) / len(flagged)
    assert site.details["dense_tokens"] == pytest.approx(dense)
    assert dense <= 0.01


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.3, 0.5, 0.99, 1.0])
def test_keep_is_rounded_up_to_whole_neurons(keep: float) -> None:
    (site,) = folded(own_model(False), keep=keep).sites
    count = -(-round(100 * keep) * NEURONS // 100)
    assert site.details["kept"] == count
    kept = site.tensors.get("kept", torch.zeros(0))
    assert len(kept) == count
    assert torch.equal(kept, kept.unique())
    assert ("weight" in site.tensors) == (count < NEURONS)


def test_keeping_more_neurons_costs_less_error() -> None:
    errors = [folded(own_model(False), keep=keep).sites[0].nmse for keep in (0.0, 0.3, 0.6, 1.0)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > errors[3] == 0


# What is chosen.


@pytest.fixture(scope="module")
def four_sites() -> Calibrated:
    return observe_model(
        own_model(False, True, False, True), stream(), ffn_config(keep=0.25), progress=False
    )


def choose(found: Calibrated, **options: Any) -> nbl.Plan:
    return found.plan(ffn=nbl.FFN(keep=0.25, **options))


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
        four_sites.plan(ffn=nbl.FFN(**{"keep": 0.25, **options}))


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
    torch.testing.assert_close(made, stream_, rtol=2e-5, atol=2e-5)


# Together with attention.

ATTENTION, FFNS = nbl.Attention(count=1), nbl.FFN(count=1, keep=0.25)


@cache
def both() -> tuple[nn.Module, nbl.Plan]:
    model = tiny()
    config = nbl.Config(attention=ATTENTION, ffn=FFNS)
    plan = nbl.calibrate(model, texts(), config, progress=False)
    nbl.attach(model, None)
    return model, plan


def test_one_calibration_for_both_kinds_is_the_two_apart() -> None:
    model, plan = both()
    apart = [
        nbl.calibrate(model, texts(), nbl.Config(attention=a, ffn=f), progress=False)
        for a, f in ((ATTENTION, None), (None, FFNS))
    ]
    nbl.attach(model, None)
    sites = [*apart[0].sites, *apart[1].sites]
    assert [site.kind for site in plan.sites] == ["attention"] * 2 + ["ffn"] * 2
    joined = replace(plan, sites=tuple(sites))
    assert joined.digest == plan.digest


def test_a_plan_of_both_kinds_survives_its_file(tmp_path: Path) -> None:
    model, plan = both()
    plan.save(tmp_path / "plan.safetensors")
    loaded = nbl.Plan.load(tmp_path / "plan.safetensors")
    assert loaded.digest == plan.digest
    for key, tensor in plan.tensors().items():
        assert loaded.tensors()[key].dtype == tensor.dtype
        assert torch.equal(loaded.tensors()[key], tensor)
    first = output(compiled(model, plan=plan), text(), use_cache=False)
    assert torch.equal(output(compiled(model, plan=loaded), text(), use_cache=False), first)
    assert not torch.equal(output(model, text(), use_cache=False), first)


def test_a_batch_that_ranks_by_loss_is_not_fitted_to() -> None:
    """The last batch is set aside in every pass, also if the batches come from an iterator."""
    model, options = tiny(layers=1), nbl.FFN(max_nmse=1e9, keep=0.25)
    config = nbl.Config(attention=nbl.Attention(rank_by="loss", count=1), ffn=options)
    plan = nbl.calibrate(model, iter(texts()), config, progress=False)
    alone = nbl.calibrate(
        model, texts()[:-1], nbl.Config(attention=None, ffn=options), progress=False
    )
    assert_same_plan(
        replace(plan, sites=tuple(s for s in plan.sites if s.kind == "ffn")), alone, 0.0
    )


# Whose plan it is.


@cache
def owned() -> tuple[OwnModel, nbl.Plan]:
    model = own_model(False, False)
    plan = folded(model, layers=(1,), **FORMS["exact"])
    nbl.attach(model, None)
    return model, plan


def scale_down(model: OwnModel) -> None:
    model.layers[1].down.weight.mul_(1.01)


def shift_bias(model: OwnModel) -> None:
    model.layers[1].up.bias.add_(0.01)


def change_before(model: OwnModel) -> None:
    model.layers[0].up.weight.mul_(1.01)


def permute_neurons(model: OwnModel) -> None:
    """The same function, but the plan's neurons would be others."""
    ffn = model.layers[1]
    for tensor, dim in ((ffn.up.weight, 0), (ffn.up.bias, 0), (ffn.down.weight, 1)):
        tensor.copy_(tensor.flip(dim))


def run(model: nn.Module, plan: nbl.Plan) -> None:
    with torch.no_grad():
        compiled_ffn(model, plan)(rows(1, 3))


@pytest.mark.parametrize("change", [scale_down, shift_bias, change_before, permute_neurons])
def test_other_weights(change: Callable[[OwnModel], None]) -> None:
    model, plan = owned()
    other = copy.deepcopy(model)
    with torch.no_grad():
        change(other)
    message = "is not one that the plan was calibrated on; calibrate this model"
    with pytest.raises(PlanMismatchError, match=message):
        nbl.attach(other, plan)
    with pytest.raises(PlanMismatchError, match=message):
        run(other, plan)


def test_the_same_weights_in_other_places() -> None:
    model, plan = owned()
    other = copy.deepcopy(model)
    other.layers = nn.ModuleList(reversed(other.layers))
    with pytest.raises(PlanMismatchError, match=r"does not fit layers\.1"):
        run(other, plan)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: own_model(False, False, activation="silu"), "activation 'gelu', the model has"),
        (lambda: own_model(False, False, seed=1), "does not fit"),
        (lambda: own_model(False, True), "gated False, the model has True"),
    ],
)
def test_another_model(other: Callable[[], OwnModel], message: str) -> None:
    """The first has the very same weights, names and shapes, and another activation."""
    with pytest.raises(PlanMismatchError, match=message):
        run(other(), owned()[1])


def edited(plan: nbl.Plan, key: str, tensor: Tensor | None) -> nbl.Plan:
    site = plan.sites[1]
    tensors = {name: t for name, t in site.tensors.items() if name != key}
    if tensor is not None:
        tensors[key] = tensor
    return replace(plan, sites=(plan.sites[0], replace(site, tensors=tensors)))


@pytest.mark.parametrize("how", ["missing", "short"])
@pytest.mark.parametrize("key", ["weight", "bias", "kept", "up_slope", "intercept", "low", "high"])
def test_tensors_of_the_wrong_shape(key: str, how: str) -> None:
    model, plan = owned()
    tensor = plan.sites[1].tensors[key]
    wrong = None if how == "missing" else tensor[1:]
    shape = "None" if wrong is None else str(tuple(wrong.shape))
    message = rf"the plan's {key} for layers\.1 has shape "
    with pytest.raises(PlanMismatchError, match=message) as raised:
        run(model, edited(plan, key, wrong))
    assert f"has shape {shape}, the model needs {tuple(tensor.shape)}" in str(raised.value)


@pytest.mark.parametrize("key", ["neurons", "gated", "activation"])
def test_facts_of_another_ffn(key: str) -> None:
    model, plan = owned()
    site = plan.sites[1]
    other = {"neurons": NEURONS + 1, "gated": True, "activation": "relu"}[key]
    wrong = replace(site, details={**site.details, key: other})
    with pytest.raises(PlanMismatchError, match=f"the plan folds layers.1 with {key} {other!r}"):
        run(model, replace(plan, sites=(plan.sites[0], wrong)))


def test_weights_that_were_released_for_another_plan() -> None:
    model = own_model(False)
    plan = folded(model, **FORMS["exact, 8 bits"])
    nbl.release(model, plan, rows(1, 3))
    run(model, plan)
    with pytest.raises(WeightsReleasedError, match=r"folding layers\.0 by this plan needs 4"):
        run(model, replace(plan))
    with pytest.raises(WeightsReleasedError, match="calibration needs 4 weight"):
        folded(model)
