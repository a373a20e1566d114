"""Weight-only int8: the peers' own package, torchao (``Int8WeightOnlyConfig``).

Every linear layer's weight is stored as int8 with one scale a row, and multiplied in the
activations' dtype.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from peers.does_not_apply import DoesNotApply
from peers.shared_copy import shared_copy


def int8(model: nn.Module, leave: Collection[str] = ()) -> nn.Module:
    """Return a copy with quantized linear layers.

    Args:
        model: The original.
        leave: Modules to leave as they are, with all that is in them.

    Raises:
        DoesNotApply: if torchao is not installed.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as missing:
        raise DoesNotApply(f"torchao is not installed: pip install torchao ({missing})") from None

    def chosen(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and not any(
            f"{name}.".startswith(f"{other}.") for other in leave
        )

    quantized = shared_copy(model)
    quantize_(quantized, Int8WeightOnlyConfig(set_inductor_config=False), filter_fn=chosen)
    return quantized
