"""Which plan belongs to which model: ``nbl.attach``.

A backend sees a graph and its inputs, never the model; so plans are found through the model's
parameters, held weakly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import CodeType

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from nbl_compiler.errors import PlanMismatchError
from nbl_compiler.fingerprint import Sketch, find_stranger
from nbl_compiler.int8_weights import int8_of, is_quantized
from nbl_compiler.plans import Plan

_plans: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter → plan
_compiled: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter → code objects of its graphs


def attach(model: nn.Module, plan: Plan | None) -> None:
    """Tie a plan to a model: ``torch.compile(model, backend="nbl")`` then finds it.

    A model that was compiled before picks the change up at its next call. A plan given as
    ``options={"plan": ...}`` comes first. A deep copy of the model has no plan until it is
    attached to it as well.

    Args:
        model: The calibrated model, or one with the same weights.
        plan: The plan, or None to detach.

    Raises:
        PlanMismatchError: if the plan was calibrated on other weights.
    """
    if plan is not None:
        check_weights(dict(model.named_parameters()), plan, type(model).__name__)
    changed = [p for p in model.parameters() if _plans.get(p) is not plan]
    for parameter in changed:
        if plan is None:
            _plans.pop(parameter)
        else:
            _plans[parameter] = plan
    _forget_compiled_code(changed)


def find_plan(inputs: Iterable[object]) -> Plan | None:
    """Return the plan attached to the parameters among a graph's inputs, if there is one.

    Raises:
        PlanMismatchError: if the graph mixes parameters of models with different plans.
    """
    plans = {id(p): p for x in inputs if isinstance(x, nn.Parameter) and (p := _plans.get(x))}
    if len(plans) > 1:
        raise PlanMismatchError(
            "one graph holds models with different plans; compile each model on its own, or give "
            'options={"plan": ...}'
        )
    return next(iter(plans.values()), None)


def remember_compiled(inputs: Iterable[object], code: CodeType | None) -> None:
    """Note that ``code`` holds compiled graphs made with what is attached to these parameters."""
    if code is None:
        return
    for x in inputs:
        if isinstance(x, nn.Parameter):
            _compiled.setdefault(x, set()).add(code)


def _forget_compiled_code(parameters: Iterable[nn.Parameter]) -> None:
    """Drop Dynamo's code for these parameters: nothing that it guards on tells it of a new plan.

    Guarding on the attachments instead would leave a dead entry (and the old plan's tensors)
    behind at every change, and after ``recompile_limit`` of them Dynamo would silently run eager.
    """
    from torch._C._dynamo.eval_frame import reset_code

    stale: set[CodeType] = set()
    for parameter in parameters:
        stale |= _compiled.pop(parameter, set())
    for code in stale:
        reset_code(code)


def check_weights(
    weights: Mapping[str, Tensor], plan: Plan, what: str, known: Iterable[Sketch] | None = None
) -> None:
    """Raise unless every weight is one that the plan was calibrated on.

    Args:
        weights: Name (for people) → weight. Integer weights and those on ``meta`` are skipped.
        plan: The plan.
        what: The model, or the site of it, that the weights belong to.
        known: The sketches to compare with, if not all of the plan's.

    Raises:
        PlanMismatchError: naming the first weight that the plan does not know; also if weights are
            quantized and the plan is of a release that could not recognise such.
        UnsupportedDtypeError: if a weight is quantized by a scheme that is not known here.
    """
    floating = {
        name: weight
        for name, weight in weights.items()
        if weight.is_floating_point() and weight.device != torch.device("meta")
    }
    known = tuple(plan.fingerprint if known is None else known)
    quantized = [name for name, weight in floating.items() if is_quantized(weight)]
    for name in quantized:
        int8_of(floating[name], f"{name} of {what}")
    if quantized and all(item.peaks is None for item in known):
        raise PlanMismatchError(
            f"{quantized[0]} of {what} is quantized, and this plan is of an older release, which "
            "kept too little of the weights to recognise them so; calibrate the model anew before "
            "it is quantized"
        )
    stranger = find_stranger(floating, known)
    if stranger is not None:
        raise PlanMismatchError(
            f"the plan for {plan.model or 'another model'} does not fit {what}: its weight "
            f"{stranger} of shape {tuple(floating[stranger].shape)} is not one that the plan was "
            "calibrated on; calibrate this model"
        )
