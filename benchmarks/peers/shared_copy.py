"""A copy of a model whose modules can be replaced, and whose parameters are those of the original.

Only what a recipe replaces takes memory of its own.
"""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def shared_copy(model: Model) -> Model:
    """Return new modules that hold the same ``Parameter`` objects.

    Args:
        model: The original; replacing a module or a parameter of the copy leaves it as it was.
    """
    return copy.deepcopy(model, memo={id(p): p for p in model.parameters()})
