"""Who takes part: name → how to make it of a dense model, where it comes from, what it changes.

``fraction`` says how much is replaced: of the attention layers, or of each FFN's neurons (weights,
activations) in all FFNs; for TARDIS it is the in-range target.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from peers import cats, teal
from peers.attention_drop import drop, static_cache, without_attention
from peers.flap import flap
from peers.magnitude import magnitude
from peers.nbl_paper import observe, published
from peers.ria import ria
from peers.tardis import tardis
from peers.wanda import wanda
from torch import nn

from bench.random_plans import evenly, guarded_plan, random_plan
from bench.subjects import Subject
from nbl_compiler.calibration import observe_model
from nbl_compiler.config import FFN, Attention, Config
from nbl_compiler.plans import Plan
from nbl_compiler.shared_copy import int8_copy
from nbl_compiler.value_states import NO_STATES, States

Family = Literal["dense", "attention", "ffn", "weights"]
HERE, RECIPE, PACKAGE = (
    "this package",
    "published recipe, implemented here",
    "the peers' own package",
)
EVERY = 1e9
"""No error is too large: all FFNs are folded."""
MIXED = States(mixed=True)
GUARD_TOKENS = 4096
"""Guards fit fewer numbers than maps."""


@dataclass(frozen=True)
class Made:
    """A contender made for one model.

    Args:
        model: What runs, in the place of the dense model.
        plan: What it is compiled with; without one it is compiled by Inductor alone.
        cache: Makes its static KV cache of a length, if not the usual one.
        calibration_seconds: What making it took.
        unread: Parameters that a token would leave unread with kernels of its paper.
    """

    model: nn.Module
    plan: Plan | None = None
    cache: Callable[[int], Any] | None = None
    calibration_seconds: float = 0.0
    unread: int = 0


@dataclass(frozen=True)
class Contender:
    """One way to a smaller or faster model.

    Args:
        name: In tables.
        family: What it replaces.
        origin: Whose implementation it is.
        make: Makes it, with calibration.
        random: Makes it of random weights, where only the speed counts; None if nothing gets
            faster by it (here).
        compiled: Whether it is compiled at all.
        least: Where speed is measured, it replaces at least this fraction: a guard that puts half
            of the neurons right on each token reads more than the dense FFN.
        picks: Whether it picks neurons by comparing predictions.
    """

    name: str
    family: Family
    origin: str
    make: Callable[[Subject, float], Made]
    random: Callable[[nn.Module, float], Made] | None = None
    compiled: bool = True
    least: float = 0.0
    picks: bool = False

    def made(self, subject: Subject, fraction: float) -> Made:
        """Return the contender for a subject, made once; with the seconds that took.

        Raises:
            DoesNotApply: if the recipe has no meaning for the model.
            NBLError: if this package cannot do it.
        """

        def new() -> Made:
            if not subject.random:
                return self.make(subject, fraction)
            assert self.random is not None
            return self.random(subject.model, fraction)

        made, seconds = subject.remember(self._key(fraction), new)
        return replace(made, calibration_seconds=made.calibration_seconds or seconds)

    def forget(self, subject: Subject, fraction: float) -> None:
        """Let go of what was made."""
        subject.forget(self._key(fraction))

    def _key(self, fraction: float) -> str:
        return f"{self.name} {fraction:g}"


def _layers(model: nn.Module, fraction: float) -> int:
    return round(fraction * int(model.config.get_text_config().num_hidden_layers))


def _dense(subject: Subject, _: float) -> Made:
    return Made(subject.model)


def _empty_plan(subject: Subject, _: float) -> Made:
    """A plan that changes nothing: products of few tokens are streamed all the same."""
    return Made(subject.model, Plan())


def _dense_random(model: nn.Module, _: float) -> Made:
    return Made(model)


def _dropped(model: nn.Module) -> Made:
    return Made(model, cache=lambda length: static_cache(model, length))


def _drop_random(model: nn.Module, fraction: float) -> Made:
    every = [str(i) for i in range(_layers(model, 1.0))]
    chosen = evenly(every, _layers(model, fraction))
    return _dropped(without_attention(model, [int(i) for i in chosen]))


def _nbl_paper(subject: Subject, fraction: float) -> Made:
    found, seconds = subject.remember(
        "NBL's statistics", lambda: observe(subject.model, subject.batches)
    )
    plan = published(found, _layers(subject.model, fraction))
    return Made(subject.model, plan, calibration_seconds=seconds)


def _attention(**options: Any) -> Callable[[Subject, float], Made]:
    def make(subject: Subject, fraction: float) -> Made:
        most = max(_layers(subject.model, subject.most), 1)
        choice = Attention(count=most, rank_by="loss", **options)

        def calibrate() -> Any:
            return observe_model(subject.model, subject.batches, Config(choice), progress=False)

        found, seconds = subject.remember(f"attention maps, {options}", calibrate)
        plan = found.plan(replace(choice, count=_layers(subject.model, fraction)))
        return Made(subject.model, plan, calibration_seconds=seconds)

    return make


def _attention_random(states: States) -> Callable[[nn.Module, float], Made]:
    def make(model: nn.Module, fraction: float) -> Made:
        return Made(model, random_plan(model, _layers(model, fraction), 0, 0.0, states=states))

    return make


def _keep_and_fold(subject: Subject, fraction: float) -> Made:
    return _folded(subject, FFN(max_nmse=EVERY, keep=1 - fraction), None)


def _keep_and_fold_random(model: nn.Module, fraction: float) -> Made:
    return Made(model, random_plan(model, 0, _layers(model, 1.0), 1 - fraction))


def _guarded(**options: Any) -> Callable[[Subject, float], Made]:
    def make(subject: Subject, fraction: float) -> Made:
        form = FFN(max_nmse=EVERY, keep=0.0, guard="predicted", capacity=1 - fraction, **options)
        return _folded(subject, form, GUARD_TOKENS)

    return make


def _guarded_random(**options: Any) -> Callable[[nn.Module, float], Made]:
    return lambda model, fraction: Made(model, guarded_plan(model, 1 - fraction, **options))


def _folded(subject: Subject, form: FFN, tokens: int | None) -> Made:
    batches = subject.batches
    if tokens is not None:
        size = _tokens(batches[0])
        batches = batches[: max(tokens // size, 1)]
    found = observe_model(subject.model, batches, Config(None, form), progress=False)
    return Made(subject.model, found.plan())


def _tokens(batch: Any) -> int:
    ids = batch if not isinstance(batch, dict) else batch["input_ids"]
    return int(ids.numel())


def _int8_and_plan(subject: Subject, fraction: float) -> Made:
    plan = _attention(mixed=True)(subject, fraction).plan
    return Made(int8_copy(subject.model), plan)


CONTENDERS = {
    one.name: one
    for one in (
        Contender("dense eager", "dense", HERE, _dense, _dense_random, compiled=False),
        Contender("dense inductor", "dense", HERE, _dense, _dense_random),
        Contender("empty plan", "dense", HERE, _empty_plan, lambda m, _: Made(m, Plan())),
        Contender(
            "attention dropped", "attention", RECIPE,
            lambda s, f: _dropped(drop(s.model, s.batches, f)), _drop_random,
        ),
        Contender(
            "NBL, published", "attention", RECIPE, _nbl_paper, _attention_random(NO_STATES)
        ),
        Contender("NBL", "attention", HERE, _attention(), _attention_random(NO_STATES)),
        Contender(
            "value taps", "attention", HERE, _attention(taps=1), _attention_random(States(1, True))
        ),
        Contender(
            "mixed values", "attention", HERE, _attention(mixed=True), _attention_random(MIXED)
        ),
        Contender(
            "Wanda", "ffn", RECIPE, lambda s, f: Made(wanda(s.model, s.batches, f))
        ),
        Contender("RIA", "ffn", RECIPE, lambda s, f: Made(ria(s.model, s.batches, f))),
        Contender(
            "magnitude", "ffn", RECIPE, lambda s, f: Made(magnitude(s.model, f)),
            lambda m, f: Made(magnitude(m, f)),
        ),
        Contender("FLAP", "ffn", RECIPE, lambda s, f: Made(flap(s.model, s.batches, f))),
        Contender(
            "TEAL", "ffn", RECIPE,
            lambda s, f: Made(
                teal.teal(s.model, s.batches, f), unread=teal.unread_parameters(s.model, f)
            ),
        ),
        Contender(
            "CATS", "ffn", RECIPE,
            lambda s, f: Made(
                cats.cats(s.model, s.batches, f), unread=cats.unread_parameters(s.model, f)
            ),
        ),
        Contender(
            "TARDIS, published", "ffn", RECIPE,
            lambda s, f: Made(s.model, tardis(s.model, s.batches, f)),
        ),
        Contender("keep+fold", "ffn", HERE, _keep_and_fold, _keep_and_fold_random),
        Contender("guarded", "ffn", HERE, _guarded(), _guarded_random(), least=0.8, picks=True),
        Contender(
            "guarded, predicted values", "ffn", HERE, _guarded(values="predicted"),
            _guarded_random(values="predicted"), least=0.8, picks=True,
        ),
        Contender(
            "int8", "weights", PACKAGE, lambda s, _: Made(int8_copy(s.model)),
            lambda m, _: Made(int8_copy(m)),
        ),
        Contender(
            "int8 + plan", "weights", PACKAGE + " and this one", _int8_and_plan,
            lambda m, f: Made(int8_copy(m), _attention_random(MIXED)(m, f).plan),
        ),
    )
}  # fmt: skip
"""Everyone, by name."""
