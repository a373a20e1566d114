"""Calibration statistics of attention the published way: stored, one layer at a time, two passes.

What the released code of NBL (arXiv 2505.21077) computes for each layer, from the block's input X
and attention's output Y, in float64: E[X], E[Y], then the centred C_XX, C_YX and C_YY. Activations
of all tokens are kept in memory until the layer is done. Implemented here, to compare calibration's
time and memory with, in two ways:

- the stream is stored as well, and the layer's own output becomes the input of the next: what the
  released code does, with a forward pass in all (``stored_statistics``);
- only the layer's own activations are stored, and the model runs once for each layer
  (``layer_statistics``): where the stream of all tokens does not fit into memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peers.attention_drop import decoder_layers


class Statistics(NamedTuple):
    """Of one layer, float64.

    Args:
        mean_x: [d].
        mean_y: [d].
        xx: C_XX [d, d].
        yx: C_YX [d, d].
        yy: C_YY [d, d].
    """

    mean_x: Tensor
    mean_y: Tensor
    xx: Tensor
    yx: Tensor
    yy: Tensor


class _Reached(Exception):
    """The first block has been reached; what it was given is known."""


def stored_statistics(model: nn.Module, batches: Sequence[Tensor]) -> list[Statistics]:
    """Return the statistics of every layer's attention: X what it reads, Y its output.

    Args:
        model: A pre-norm decoder whose blocks take the hidden state first.
        batches: Token ids [B, T].
    """
    layers = decoder_layers(model)
    stream: list[Tensor] = []
    given: list[dict[str, Any]] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream.append(args[0])
        given.append(kwargs)
        raise _Reached

    hook = layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    with torch.no_grad():
        for batch in batches:
            try:
                model.base_model(input_ids=batch, use_cache=False)
            except _Reached:
                continue
        hook.remove()
        made = []
        for layer in layers:
            stream, x, y = _run_layer(layer, stream, given)
            made.append(_two_passes(x, y))
    return made


def layer_statistics(model: nn.Module, batches: Sequence[Tensor], index: int) -> Statistics:
    """Return the statistics of one layer's attention, for which the whole model runs.

    Args:
        model: As for ``stored_statistics``, as are ``batches``.
        batches: See there.
        index: Of the layer.
    """
    read: list[Tensor] = []
    wrote: list[Tensor] = []
    hook = _keep_rows(decoder_layers(model)[index], read, wrote)
    with torch.no_grad():
        for batch in batches:
            model.base_model(input_ids=batch, use_cache=False)
    hook.remove()
    return _two_passes(torch.cat(read), torch.cat(wrote))


def _run_layer(
    layer: Any, stream: Sequence[Tensor], given: Sequence[dict[str, Any]]
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return the layer's outputs, and all rows of what attention read and made, [tokens, d]."""
    read: list[Tensor] = []
    wrote: list[Tensor] = []
    hook = _keep_rows(layer, read, wrote)
    outputs = [layer(h, **kwargs) for h, kwargs in zip(stream, given, strict=True)]
    hook.remove()
    return outputs, torch.cat(read), torch.cat(wrote)


def _keep_rows(layer: Any, read: list[Tensor], wrote: list[Tensor]) -> RemovableHandle:
    """Keep what a layer's attention reads and makes, [tokens, d] a call, until it is removed."""

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        read.append(kwargs["hidden_states"].flatten(0, -2))
        wrote.append(output[0].flatten(0, -2))

    hook: RemovableHandle = layer.self_attn.register_forward_hook(keep, with_kwargs=True)
    return hook


def _two_passes(x: Tensor, y: Tensor) -> Statistics:
    x, y = x.double(), y.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    count = len(x) - 1
    return Statistics(mean_x, mean_y, x.T @ x / count, y.T @ x / count, y.T @ y / count)
