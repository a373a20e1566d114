"""Which parameters ``nbl.release`` has let go of."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from nbl_compiler.errors import WeightsReleasedError

_released: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter → what to do about it


def mark_released(weight: nn.Parameter) -> None:
    """Note that a parameter holds no values any more."""
    _released[weight] = True


def is_released(weight: object) -> bool:
    """Tell whether a parameter's values were let go of."""
    return isinstance(weight, nn.Parameter) and weight in _released


def refuse_released(weights: Iterable[object], purpose: str) -> None:
    """Raise if one of the weights was released.

    Args:
        weights: Parameters, and anything else, which is passed over.
        purpose: What needs them, for the message.

    Raises:
        WeightsReleasedError: if one of them was.
    """
    count = sum(is_released(weight) for weight in weights)
    if count:
        raise WeightsReleasedError(
            f"{purpose} needs {count} weight(s) that nbl.release let go of; load the model again, "
            'or run it by torch.compile(model, backend="nbl") with the plan it was released for'
        )
