"""A tiny model whose every weight matters, text for it, and how to run it through the backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from helpers.scenarios import enliven, main_output
from models.architectures import VOCABULARY, make
from torch import Tensor, nn

import nbl_compiler as nbl

LAYERS = 2


def tiny(name: str = "llama", seed: int = 0, layers: int = LAYERS) -> nn.Module:
    """Build a tiny model of the family, in eval mode."""
    model = make(name, seed=seed, layers=layers)
    enliven(model)
    if seed:  # enliven is the same for all; let seeds differ
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model


class Wrapped(nn.Module):
    """A model that is not from transformers, with an input of its own name."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, tokens: Tensor) -> Any:
        return self.body(tokens)


def text(batch: int = 4, length: int = 48, seed: int = 0) -> Tensor:
    """Return random token ids, [B, T]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCABULARY, (batch, length), generator=generator)


def texts(count: int = 3) -> list[Tensor]:
    """Return several batches of one shape."""
    return [text(seed=seed) for seed in range(count)]


def config(holdout: float = 0.1, ridge: float | str = "auto", **attention: Any) -> nbl.Config:
    """Return a configuration by the options of its attention part."""
    return nbl.Config(attention=nbl.Attention(**attention), holdout=holdout, ridge=ridge)


def calibrated(model: nn.Module, **attention: Any) -> nbl.Plan:
    """Calibrate on a little text (the best site, unless told otherwise)."""
    return nbl.calibrate(model, texts(), config(**attention), progress=False)


def compiled(model: nn.Module, **options: Any) -> Callable[..., Any]:
    """Compile without lowering."""
    return torch.compile(model, backend="nbl", options={"lowering": "eager", **options})


def output(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    """Return the logits, or an encoder's last hidden state, without gradients."""
    with torch.no_grad():
        return main_output(model(*args, **kwargs))
