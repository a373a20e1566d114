"""Weight-only int8: the peers' own package, torchao (``Int8WeightOnlyConfig``).

Every linear layer's weight is stored as int8 with one scale a row, and multiplied in the
activations' dtype.
"""

from __future__ import annotations

from torch import nn

from peers.does_not_apply import DoesNotApply
from peers.shared_copy import shared_copy


def int8(model: nn.Module) -> nn.Module:
    """Return a copy with quantized linear layers.

    Raises:
        DoesNotApply: if torchao is not installed.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as missing:
        raise DoesNotApply(f"torchao is not installed: pip install torchao ({missing})") from None
    quantized = shared_copy(model)
    quantize_(quantized, Int8WeightOnlyConfig())
    return quantized
