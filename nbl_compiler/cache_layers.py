"""Cache layers that count positions and store no states.

Each mirrors one of transformers' layers: the same length, the same mask sizes (masks are built from
the first layer of each type, linearized or not), and ``nbl::absent_kv`` in place of the states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from nbl_compiler.errors import ConfigError
from nbl_compiler.lowering.absent_kv import absent_kv


class LengthOnlyStaticLayer(StaticLayer):
    """``StaticLayer`` without storage: the length counter lives, keys and values are empty."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Move the counter to the device; allocate nothing."""
        _initialize_empty(self, key_states)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Count the new positions; return stand-ins of the shape the mask expects."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length, _ = self.get_mask_sizes(key_states.shape[-2])
        self.cumulative_length.add_(key_states.shape[-2])
        return absent_kv(key_states, length), absent_kv(value_states, length)


class LengthOnlyStaticSlidingLayer(StaticSlidingWindowLayer):
    """``StaticSlidingWindowLayer`` without storage."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Move the counter to the device; allocate nothing."""
        _initialize_empty(self, key_states)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Count the new positions; return stand-ins of the shape the mask expects."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length, _ = self.get_mask_sizes(key_states.shape[-2])
        if self.cumulative_length_int + key_states.shape[-2] <= self.max_cache_len:
            self.cumulative_length.add_(key_states.shape[-2])
        self.cumulative_length_int += key_states.shape[-2]
        return absent_kv(key_states, length), absent_kv(value_states, length)


class LengthOnlyDynamicLayer(DynamicLayer):
    """``DynamicLayer`` without storage: ``keys`` has the right length and no elements."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Start with length 0."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = self.values = _empty(key_states, 0)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Grow the length; return stand-ins of the shape the mask expects."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length, _ = self.get_mask_sizes(key_states.shape[-2])
        self.keys = _empty(key_states, length)
        self.values = _empty(key_states, length)
        return absent_kv(key_states, length), absent_kv(value_states, length)

    def get_seq_length(self) -> int:
        """Return the number of positions seen."""
        return 0 if self.keys is None else self.keys.shape[-2]


class LengthOnlyDynamicSlidingLayer(DynamicSlidingWindowLayer):
    """``DynamicSlidingWindowLayer`` without storage."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Start with length 0."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = self.values = _empty(key_states, 0)
        self._sliding_window_tensor = self._sliding_window_tensor.to(self.device)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Grow the length; return stand-ins of the shape the mask expects."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length, _ = self.get_mask_sizes(key_states.shape[-2])
        self.cumulative_length += key_states.shape[-2]
        return absent_kv(key_states, length), absent_kv(value_states, length)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` positions; there are no states to lose.

        Raises:
            ValueError: for a positive number, as the layers of transformers do.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give the number of tokens as a negative")
        self.cumulative_length = max(self.cumulative_length + tokens_to_remove, 0)


def _empty(states: Tensor, length: int) -> Tensor:
    # Not states.new_empty: the matcher would see a use of the keys outside attention.
    shape = (states.shape[0], states.shape[1], length, 0)
    return torch.empty(shape, dtype=states.dtype, device=states.device)


def _initialize_empty(layer: StaticLayer, states: Tensor) -> None:
    layer.dtype, layer.device = states.dtype, states.device
    layer.batch_size, layer.num_heads = states.shape[:2]
    layer.keys = layer.values = _empty(states, 0)
    layer.cumulative_length = layer.cumulative_length.to(layer.device)
    if not torch.compiler.is_compiling():  # as StaticLayer does, for CUDA graphs
        torch._dynamo.mark_static_address(layer.cumulative_length)
    layer.is_initialized = True


def length_only(layer: Any) -> CacheLayerMixin:
    """Return the storage-free counterpart of a fresh cache layer.

    Raises:
        ConfigError: if transformers made a kind of layer that has none.
    """
    kind = type(layer)
    if kind is StaticSlidingWindowLayer:
        return LengthOnlyStaticSlidingLayer(layer.max_cache_len, sliding_window=layer.max_cache_len)
    if kind is StaticLayer:
        return LengthOnlyStaticLayer(layer.max_cache_len)
    if kind is DynamicSlidingWindowLayer:
        return LengthOnlyDynamicSlidingLayer(layer.sliding_window)
    if kind is DynamicLayer:
        return LengthOnlyDynamicLayer()
    raise ConfigError(
        f"nbl.cache has no storage-free form of {kind.__name__}; use an ordinary cache"
    )
