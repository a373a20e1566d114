"""From what a user gives as a batch to the keyword arguments of a model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nbl_compiler.errors import CalibrationError

Batch = Tensor | Mapping[str, Any] | Sequence[Tensor]


def model_inputs(model: nn.Module, batch: Batch, device: torch.device) -> dict[str, Any]:
    """Return the model's keyword arguments for a batch.

    Args:
        model: The model.
        batch: The model's main input (token ids [B, T], or one row [T]), a mapping of its
            inputs, or the one-element list that a ``DataLoader`` makes of a ``TensorDataset``.
        device: Where the model's weights are.

    Raises:
        CalibrationError: for anything else.
    """
    if isinstance(batch, list | tuple) and len(batch) == 1:
        batch = batch[0]
    if isinstance(batch, Tensor):
        tokens = batch.unsqueeze(0) if batch.ndim == 1 else batch
        batch = {_main_input(model): tokens}
    if not isinstance(batch, Mapping):
        raise CalibrationError(
            "`batches` is an iterable of token id tensors or of mappings of model inputs; it gave "
            f"a {type(batch).__name__}"
        )
    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    inputs.pop("labels", None)
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if encoder_decoder and "input_ids" in inputs and not _feeds_decoder(inputs):
        # The decoder needs text as well; the shifted input is what teacher forcing would feed it.
        inputs["decoder_input_ids"] = inputs["input_ids"]
        if "attention_mask" in inputs:
            inputs["decoder_attention_mask"] = inputs["attention_mask"]
    return inputs


def cheap_arguments(model: nn.Module) -> dict[str, Any]:
    """Return arguments that spare work no site needs: the LM head on all positions, the cache."""
    accepted = inspect.signature(model.forward).parameters
    cheap = {"logits_to_keep": 1, "use_cache": False}
    return {name: value for name, value in cheap.items() if name in accepted}


def _main_input(model: nn.Module) -> str:
    name = getattr(model, "main_input_name", None)
    if name is not None:
        return str(name)
    accepted = list(inspect.signature(model.forward).parameters)
    return "input_ids" if "input_ids" in accepted or not accepted else accepted[0]


def _feeds_decoder(inputs: Mapping[str, Any]) -> bool:
    return "decoder_input_ids" in inputs or "decoder_inputs_embeds" in inputs
