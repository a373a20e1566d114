"""Which plan belongs to which model: ``nbl.attach``.

A backend sees a graph and its inputs, never the model; so plans are found through the model's
parameters, held weakly.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from nbl_compiler.errors import PlanMismatchError
from nbl_compiler.fingerprint import find_stranger
from nbl_compiler.plan import Plan

# Dynamo guards on this number in every graph whose plan was looked up here, so that attaching a
# plan to a model that was compiled before makes its next call compile again.
generation = 0
_plans: WeakIdKeyDictionary = WeakIdKeyDictionary()


def attach(model: nn.Module, plan: Plan | None) -> None:
    """Tie a plan to a model: ``torch.compile(model, backend="nbl")`` then finds it.

    Args:
        model: The calibrated model, or one with the same weights.
        plan: The plan, or None to detach.

    Raises:
        PlanMismatchError: if the plan was calibrated on other weights.
    """
    global generation
    parameters = list(model.parameters())
    if plan is not None:
        check_weights(parameters, plan, type(model).__name__)
    for parameter in parameters:
        if plan is None:
            _plans.pop(parameter, None)
        else:
            _plans[parameter] = plan
    generation += 1


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


def check_weights(weights: Iterable[Tensor], plan: Plan, what: str) -> None:
    """Raise unless every weight is one that the plan was calibrated on."""
    floating = [w for w in weights if w.is_floating_point() and w.device != torch.device("meta")]
    stranger = find_stranger(floating, plan.fingerprint)
    if stranger is not None:
        raise PlanMismatchError(
            f"the plan for {plan.model or 'another model'} does not fit {what}: its weight of shape "
            f"{tuple(stranger.shape)} is not one the plan was calibrated on; calibrate this model"
        )
