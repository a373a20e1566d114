"""``nbl.calibrate`` for FFNs: what it sees and what it fits.

``test_calibration`` has attention; ``solvers/`` the mathematics alone.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
import torch._dynamo
from helpers.ffn_calibrating import (
    FORMS,
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
    ffn_config,
    folded,
    own_model,
    rows,
    stream,
)
from helpers.tiny import output, text, texts, tiny
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader

import nbl_compiler as nbl
from nbl_compiler.errors import (
    CalibrationError,
)
from nbl_compiler.ffn import predicted
from nbl_compiler.ffn.sites import FFNRows
from nbl_compiler.ffn.stages import ErrorStage, SlopeStage, TargetStage
from nbl_compiler.lowering.guarded_fit import TURNS

# Float32 rounding of products of other blocks, times the condition of the fit.
FIT_TOLERANCE = 1e-4
# The same where activations themselves are computed in other shapes, by a whole tiny model.
MODEL_TOLERANCE = 1e-3
# Float32 rounding of the moments that an error is computed from, relative to the error.
ERROR_TOLERANCE = 1e-4

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


def test_slopes_take_the_first_tokens_and_the_map_takes_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Slopes and errors: as many batches as hold their tokens; few numbers need no more."""
    seen: dict[type, int] = {}
    for kind in (SlopeStage, TargetStage, ErrorStage):

        def add(self: Any, rows: FFNRows, *, held: bool, own: Any = kind.add) -> None:
            seen[type(self)] = seen.get(type(self), 0) + rows.x.shape[0]
            own(self, rows, held=held)

        monkeypatch.setattr(kind, "add", add)
    monkeypatch.setattr(predicted, "SLOPE_TOKENS", 200)
    monkeypatch.setattr(predicted, "ERROR_TOKENS", 200)
    form = nbl.FFN(layers=(1,), keep=0, guard="predicted", capacity=0.3)
    nbl.calibrate(tiny(), texts(4), nbl.Config(None, form), progress=False)
    batch = texts(1)[0].numel()
    assert batch < 200 < 2 * batch
    sites = 2  # both FFNs are fitted, one is taken
    assert seen == {
        SlopeStage: (TURNS + 1) * 2 * batch * sites,
        TargetStage: 4 * batch * sites,
        ErrorStage: 2 * batch * sites,
    }
