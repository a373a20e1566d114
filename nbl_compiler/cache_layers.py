"""Cache layers that count positions and store nothing, or the few rows that value states need.

Each mirrors one of transformers' layers: the same length, the same mask sizes (masks are built from
the first layer of each type, linearized or not), and ``nbl::absent_kv`` in place of keys and
values. What is to be stored is not known before the plan's pass has seen the graph, so
``nbl::stored_states`` stands for that.
"""

from __future__ import annotations

from collections.abc import Callable
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
from nbl_compiler.lowering.value_states import stored_states
from nbl_compiler.value_states import NO_STATES, States


class _ValueStates:
    """What a layer stores of the values: a window of them, and the sums of its averages.

    ``states`` says what is needed; without any, nothing is stored. Sums carry averages on over any
    number of tokens. Behind a sliding window they cannot (what leaves it would have to be taken
    off), so there the window itself is stored.
    """

    states: States = NO_STATES
    value_rows: Tensor
    value_sums: Tensor

    def start_states(self, values: Tensor, window: int | None = None) -> None:
        """Allocate what is stored, as zeros.

        Args:
            values: The first call's, [B, H, T, D].
            window: Of the attention, if it slides.
        """
        if not self.states:
            return
        rows, sums = self.states.rows, self.states.sums
        if sums and window is not None:
            rows, sums = max(rows, window - 1), 0
        self.value_rows = _zeros(values, rows, values.dtype)
        self.value_sums = _zeros(values, sums, torch.float32)

    def store_states(self, values: Tensor) -> None:
        """Take note of a call's values [B, H, T, D], in place."""
        if self.states:
            rows, sums = stored_states(self.value_rows, self.value_sums, values)
            self.value_rows.copy_(rows)
            self.value_sums.copy_(sums)

    @property
    def state_tensors(self) -> tuple[Tensor, ...]:
        """Everything that is stored of the values."""
        return (self.value_rows, self.value_sums) if hasattr(self, "value_rows") else ()

    def reset(self) -> None:
        """Forget everything, and keep the memory."""
        super().reset()  # type: ignore[misc]
        for tensor in self.state_tensors:
            tensor.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give every row of the batch another row's past (beam search)."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._select(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._select(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._select(lambda t: t[indices])

    def _select(self, choose: Callable[[Tensor], Tensor]) -> None:
        if self.state_tensors:
            self.value_rows, self.value_sums = choose(self.value_rows), choose(self.value_sums)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last positions.

        Raises:
            ConfigError: if the layer stores value states, which cannot be taken back.
        """
        self.refuse_crop(tokens_to_remove)
        super().crop(tokens_to_remove)  # type: ignore[misc]

    def refuse_crop(self, tokens_to_remove: int) -> None:
        """Raise if there are value states: what went into them cannot be taken back."""
        if self.states and tokens_to_remove:
            raise ConfigError(
                "a cache from nbl.cache cannot be cropped where it holds value states (assisted "
                "decoding does): use an ordinary cache, or a plan without them"
            )


class LengthOnlyStaticLayer(_ValueStates, StaticLayer):
    """``StaticLayer`` without storage: the length counter lives, keys and values are empty."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Move the counter to the device; allocate nothing."""
        _initialize_empty(self, key_states)
        self.start_states(value_states)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Count the new positions; return stand-ins of the shape the mask expects."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length, _ = self.get_mask_sizes(key_states.shape[-2])
        self.cumulative_length.add_(key_states.shape[-2])
        self.store_states(value_states)
        return absent_kv(key_states, length), absent_kv(value_states, length)


class LengthOnlyStaticSlidingLayer(_ValueStates, StaticSlidingWindowLayer):
    """``StaticSlidingWindowLayer`` without storage."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Move the counter to the device; allocate nothing."""
        _initialize_empty(self, key_states)
        self.start_states(value_states, self.max_cache_len)

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
        self.store_states(value_states)
        return absent_kv(key_states, length), absent_kv(value_states, length)


class LengthOnlyDynamicLayer(_ValueStates, DynamicLayer):
    """``DynamicLayer`` without storage: ``keys`` has the right length and no elements."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Start with length 0."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = self.values = _empty(key_states, 0)
        self.start_states(value_states)
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
        self.store_states(value_states)
        return absent_kv(key_states, length), absent_kv(value_states, length)

    def get_seq_length(self) -> int:
        """Return the number of positions seen."""
        return 0 if self.keys is None else self.keys.shape[-2]


class LengthOnlyDynamicSlidingLayer(_ValueStates, DynamicSlidingWindowLayer):
    """``DynamicSlidingWindowLayer`` without storage."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Start with length 0."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = self.values = _empty(key_states, 0)
        self._sliding_window_tensor = self._sliding_window_tensor.to(self.device)
        self.start_states(value_states, self.sliding_window)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Grow the length; return stand-ins of the shape the mask expects."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length, _ = self.get_mask_sizes(key_states.shape[-2])
        self.cumulative_length += key_states.shape[-2]
        self.store_states(value_states)
        return absent_kv(key_states, length), absent_kv(value_states, length)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` positions; there are no states to lose.

        Raises:
            ValueError: for a positive number, as the layers of transformers do.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give the number of tokens as a negative")
        self.refuse_crop(tokens_to_remove)
        self.cumulative_length = max(self.cumulative_length + tokens_to_remove, 0)


def _empty(states: Tensor, length: int) -> Tensor:
    # Not states.new_empty: the matcher would see a use of the keys outside attention.
    shape = (states.shape[0], states.shape[1], length, 0)
    return torch.empty(shape, dtype=states.dtype, device=states.device)


def _zeros(values: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    shape = (values.shape[0], values.shape[1], rows, values.shape[3])
    made = torch.zeros(shape, dtype=dtype, device=values.device)
    if not torch.compiler.is_compiling():  # as StaticLayer does, for CUDA graphs
        torch._dynamo.mark_static_address(made)
    return made


def _initialize_empty(layer: StaticLayer, states: Tensor) -> None:
    layer.dtype, layer.device = states.dtype, states.device
    layer.batch_size, layer.num_heads = states.shape[:2]
    layer.keys = layer.values = _empty(states, 0)
    layer.cumulative_length = layer.cumulative_length.to(layer.device)
    if not torch.compiler.is_compiling():  # as StaticLayer does, for CUDA graphs
        torch._dynamo.mark_static_address(layer.cumulative_length)
    layer.is_initialized = True


_Counterpart = (
    LengthOnlyStaticLayer
    | LengthOnlyStaticSlidingLayer
    | LengthOnlyDynamicLayer
    | LengthOnlyDynamicSlidingLayer
)


def length_only(layer: Any, states: States) -> CacheLayerMixin:
    """Return the counterpart of a fresh cache layer that stores value states only.

    Raises:
        ConfigError: if transformers made a kind of layer that has none.
    """
    made = _counterpart(layer)
    made.states = states
    return made


def _counterpart(layer: Any) -> _Counterpart:
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
