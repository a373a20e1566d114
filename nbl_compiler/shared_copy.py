"""Copies of a model whose modules can be replaced, and whose parameters are those of the original.

Only what is replaced takes memory of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import TypeVar

from torch import nn

from nbl_compiler.errors import ConfigError

Model = TypeVar("Model", bound=nn.Module)


def shared_copy(model: Model) -> Model:
    """Return new modules that hold the same ``Parameter`` objects.

    Args:
        model: The original; replacing a module or a parameter of the copy leaves it as it was.
    """
    return copy.deepcopy(model, memo={id(p): p for p in model.parameters()})


def int8_copy(model: Model, leave: Collection[str] = ()) -> Model:
    """Return a copy whose linear layers torchao holds as int8, with one scale a row.

    Args:
        model: The original, which stays as it was.
        leave: Modules to leave as they are, with all that is in them.

    Raises:
        ConfigError: if torchao is not installed.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as missing:
        raise ConfigError(
            f"int8 weights are made by torchao ({missing}): pip install torchao"
        ) from missing

    def chosen(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and not any(
            f"{name}.".startswith(f"{other}.") for other in leave
        )

    quantized = shared_copy(model)
    quantize_(quantized, Int8WeightOnlyConfig(set_inductor_config=False), filter_fn=chosen)
    return quantized
