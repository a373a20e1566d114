"""Options, text and models that FFN calibration cannot serve, and what it says about them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.bad_selections import BAD_SELECTIONS
from helpers.own_ffn import (
    WIDTH,
    compiled_ffn,
    ffn_config,
    folded,
    own_model,
    rows,
    stream,
)
from torch import Tensor, nn

import nbl_compiler as nbl
from nbl_compiler.config import GUARDS, PREDICTORS
from nbl_compiler.errors import (
    CalibrationError,
    ConfigError,
    InferenceOnlyError,
    NBLError,
    UnsupportedDtypeError,
)

NAN, INFINITY = float("nan"), float("inf")

FORMS: dict[str, dict[str, Any]] = {
    "kept": {"keep": 0.25},
    "predicted": {"keep": 0.25, "guard": "predicted"},
    "exact": {"keep": 0, "guard": "exact"},
}
every_form = pytest.mark.parametrize("form", FORMS)


# Options.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *BAD_SELECTIONS,
        *(
            ({"keep": value}, r"keep=.* must lie in \[0, 1\]")
            for value in (-0.01, 1.01, NAN, INFINITY, "half", None, True)
        ),
        *(
            ({"guard": value}, "guard=.* must be 'off', 'predicted' or 'exact'")
            for value in ("on", "Exact", "", None, True, 1)
        ),
        *(
            ({"capacity": value}, r"capacity=.* must lie in \(0, 1\]")
            for value in (0, 0.0, -0.1, 1.5, 8, NAN, "all", True)
        ),
        *(
            ({"coverage": value}, r"coverage=.* must lie in \(0, 1\]")
            for value in (0, -1.0, 1.1, 90, NAN, "most", None, True)
        ),
        *(
            ({"predictor": value}, "predictor=.* must be one of auto, none, low_rank, quantized_2")
            for value in ("quantized_3", "quantized", "", None, 4)
        ),
        *(
            ({"rank": value}, "rank=.* must be an integer of at least 1")
            for value in (0, -3, 1.5, "8", None, True)
        ),
        *(
            ({"rank_by": value}, "rank_by=.* must be 'loss' or 'nmse'")
            for value in ("cca", "", None)
        ),
        *(
            ({"values": value}, "values=.* must be 'original' or 'predicted'")
            for value in ("true", "", None, True)
        ),
        *(
            (
                {"values": "predicted", **options},
                "values='predicted' needs guard='predicted' and a predictor other than 'none'",
            )
            for options in (
                {"guard": "off"},
                {"guard": "exact", "predictor": "quantized_8"},
                {"guard": "predicted", "predictor": "none"},
            )
        ),
        (
            {"guard": "exact", "predictor": "low_rank"},
            "a low-rank predictor has no certificate; for guard='exact' use 'none' or a quantized",
        ),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^FFN: {message}"):
        nbl.FFN(**options)
    if len(options) == 1:  # the message shows the very value
        (name, value), *_ = options.items()
        with pytest.raises(ConfigError, match=r"FFN: ") as raised:
            nbl.FFN(**options)
        assert name in str(raised.value)
        assert repr(value[0] if isinstance(value, tuple) else value) in str(raised.value)


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_every_other_pair_of_guard_and_predictor_is_valid(guard: Any, predictor: Any) -> None:
    if (guard, predictor) == ("exact", "low_rank"):
        return
    meant = nbl.FFN(guard=guard, predictor=predictor).predictor_kind
    assert meant in PREDICTORS[1:]
    assert predictor in (meant, "auto")


@pytest.mark.parametrize("value", [0.25, "ffn", True, nbl.Attention(), nbl.FFN])
def test_no_ffn_options_at_all(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"Config: ffn=.* must be nbl\.FFN\(\.\.\.\)"):
        nbl.Config(ffn=value)


def test_options_at_their_limits() -> None:
    for options in ({"keep": 0}, {"keep": 1}, {"capacity": 1}, {"coverage": 1}, {"rank": 1}):
        nbl.FFN(**options)  # type: ignore[arg-type]
    assert nbl.FFN(layers=range(2)).layers == (0, 1)


def test_a_rank_beyond_the_width_is_the_width() -> None:
    plan = folded(own_model(False), guard="predicted", predictor="low_rank", rank=10_000)
    assert plan.sites[0].tensors["predictor_0"].shape == (WIDTH, WIDTH)


# Exact guards of gated FFNs.

NEEDS_A_PLAIN_FFN = (
    "guard='exact' needs a plain FFN: the up projection of a gated one has no bounded range; "
    "use guard='predicted'"
)


@pytest.mark.parametrize(
    ("gated", "options", "decisions"),
    [
        ((True,), {}, ["rejected"]),
        ((True,), {"layers": (0,)}, ["rejected"]),
        ((True,), {"count": 1}, ["rejected"]),
        ((True, False), {}, ["rejected", "rewritten"]),
        ((True, False), {"count": 2}, ["rejected", "rewritten"]),
        ((True, False), {"count": 0}, ["rejected", "kept"]),
        ((True, False), {"layers": (0,)}, ["rejected", "kept"]),
        ((False, True), {"layers": ("layers.0", "layers.1")}, ["rewritten", "rejected"]),
    ],
)
def test_an_exact_guard_of_a_gated_ffn(
    gated: tuple[bool, ...], options: dict[str, Any], decisions: list[str]
) -> None:
    """The site says why, and the model runs without it."""
    model = own_model(*gated)
    plan = folded(model, guard="exact", **options)
    assert [site.decision for site in plan.sites] == decisions
    for site, is_gated in zip(plan.sites, gated, strict=True):
        assert (site.reason == NEEDS_A_PLAIN_FFN) == is_gated
        if is_gated:
            assert not site.tensors
            assert site.nmse != site.nmse  # NaN: nothing was fitted
    with torch.no_grad():
        made = compiled_ffn(model, plan)(rows(2, 3))
        assert torch.equal(made, model(rows(2, 3))) == (not plan.rewritten)
    assert NEEDS_A_PLAIN_FFN.split(":")[0] in " ".join(str(plan).split())


def test_a_gated_ffn_that_is_kept_whole_needs_no_guard() -> None:
    (site,) = folded(own_model(True), guard="exact", keep=1.0).sites
    assert (site.decision, site.nmse) == ("rewritten", 0.0)


# Text.


def empty(kind: str) -> Any:
    masked = {"x": rows(2, 40), "attention_mask": torch.zeros(2, 40, dtype=torch.long)}
    return {
        "no rows": [rows()[:0]],
        "no tokens": [rows()[:, :0]],
        "all padding": [masked],
        "several": [rows()[:0], rows()[:, :0], masked],
    }[kind]


@pytest.mark.parametrize("kind", ["no rows", "no tokens", "all padding", "several"])
@every_form
def test_batches_without_tokens(form: str, kind: str) -> None:
    message = r"layers\.0 saw 0 calibration tokens; give at least 16 \(tens of thousands"
    with pytest.raises(CalibrationError, match=message):
        folded(own_model(False), empty(kind), **FORMS[form])


@pytest.mark.parametrize("batches", [[], iter(()), ()])
def test_no_batches(batches: Any) -> None:
    with pytest.raises(CalibrationError, match="no attention or FFN site was seen: were there any"):
        folded(own_model(False), batches)


@pytest.mark.parametrize("form", ["kept", "exact"])
def test_empty_batches_among_others_do_not_count(form: str) -> None:
    batches = [rows()[:0], *stream(), rows()[:, :0]]
    plan = folded(own_model(False), batches, **FORMS[form])
    assert plan.sites[0].details["tokens"] == sum(batch[..., 0].numel() for batch in stream())
    assert plan.sites[0].holdout_nmse == pytest.approx(
        folded(own_model(False), stream(), **FORMS[form]).sites[0].holdout_nmse, rel=1e-3
    )


@pytest.mark.parametrize("tokens", [1, 15])
@every_form
def test_too_few_tokens(form: str, tokens: int) -> None:
    with pytest.raises(CalibrationError, match=rf"layers\.0 saw {tokens} calibration tokens"):
        folded(own_model(False), [rows(1, tokens)], holdout=0.0, **FORMS[form])


@pytest.mark.parametrize(
    ("form", "ridge"), [("kept", 0.0), ("kept", "auto"), ("predicted", 0.0), ("exact", "auto")]
)
def test_fewer_tokens_than_dimensions_are_enough_for_a_finite_plan(
    form: str, ridge: float | str
) -> None:
    """Sixteen tokens for eight inputs and twenty-four neurons."""
    model = own_model(False)
    plan = folded(model, [rows(1, 16)], holdout=0.0, ridge=ridge, **FORMS[form])
    assert all(t.isfinite().all() for t in plan.tensors().values() if t.is_floating_point())
    with torch.no_grad():
        assert compiled_ffn(model, plan)(rows()).isfinite().all()


@pytest.mark.parametrize(
    ("where", "value"), [("text", NAN), ("first weight", INFINITY), ("last weight", INFINITY)]
)
@every_form
def test_activations_that_are_not_finite(form: str, where: str, value: float) -> None:
    """In the last batch, or made by the second FFN's weights."""
    model, batches = own_model(False, False), stream()
    site = "layers.0" if where == "text" else "layers.1"
    with torch.no_grad():
        if where == "text":
            batches[-1][3, 4, 5] = value
        elif where == "first weight":
            model.layers[1].up.weight[2, 3] = value
        else:
            model.layers[1].down.weight[2, 3] = value
    with pytest.raises(CalibrationError, match=f"{site}: NaN or infinite .* during calibration"):
        folded(model, batches, **FORMS[form])


@pytest.mark.parametrize(
    ("batches", "kind"),
    [
        (["a text"], "str"),
        ([[rows(), rows()]], "list"),
        ([1.5], "float"),
        ({"x": rows()}, "str"),
    ],
)
def test_batches_of_the_wrong_kind(batches: Any, kind: str) -> None:
    with pytest.raises(CalibrationError, match=f"mappings of model inputs; it gave a {kind}"):
        folded(own_model(False), batches)


def test_a_wrong_choice_is_reported_after_the_first_batch() -> None:
    """Of a list; the batches of an iterator are drawn beforehand, for the further passes."""
    seen: list[int] = []

    class Batches:
        def __iter__(self) -> Iterator[Tensor]:
            for i, batch in enumerate(stream(5)):
                seen.append(i)
                yield batch

    with pytest.raises(ConfigError, match="layers holds 7, but the model has 2 sites"):
        folded(own_model(False, False), Batches(), layers=(7,))
    assert seen == [0]


# Models.


def test_models_without_an_ffn() -> None:
    with pytest.raises(CalibrationError, match="is this a transformer"):
        folded(nn.Linear(WIDTH, WIDTH).eval())


def test_training_mode() -> None:
    with pytest.raises(InferenceOnlyError, match=r"training mode; call model\.eval\(\) first"):
        folded(own_model(False).train())


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_dtypes_without_linear_maps(dtype: torch.dtype) -> None:
    with pytest.raises(UnsupportedDtypeError, match=f"is stored in {dtype}; load the model in"):
        folded(own_model(False).to(dtype))


def test_a_failed_calibration_attaches_nothing() -> None:
    model = own_model(False)
    old = folded(model)
    with pytest.raises(NBLError):
        folded(model, [rows(1, 3)])
    with torch.no_grad():
        assert torch.equal(compiled_ffn(model)(rows()), compiled_ffn(model, old)(rows()))


def test_nothing_to_calibrate() -> None:
    with pytest.raises(ConfigError, match="leaves everything alone: nothing to calibrate"):
        nbl.calibrate(own_model(False), stream(), nbl.Config(attention=None), progress=False)
    with pytest.raises(ConfigError, match="count=3 exceeds the 2 FFN sites"):
        nbl.calibrate(own_model(False, False), stream(), ffn_config(count=3), progress=False)
