"""Small FFNs outside transformers: they trace in a moment, and spawned processes import them fast.

Nothing here may import transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import nbl_compiler as nbl

WIDTH, NEURONS = 8, 24
ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "silu": nn.SiLU, "relu": nn.ReLU}


class OwnFFN(nn.Module):
    """``down(act(up(x)))``, or with ``gated`` ``down(act(gate(x)) * up(x))``."""

    def __init__(
        self,
        activation: str = "gelu",
        *,
        gated: bool = False,
        width: int = WIDTH,
        neurons: int = NEURONS,
    ) -> None:
        super().__init__()
        self.gate = nn.Linear(width, neurons) if gated else None
        self.up, self.down = nn.Linear(width, neurons), nn.Linear(neurons, width)
        self.act = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        hidden = self.act(up) if self.gate is None else self.act(self.gate(x)) * up
        down: Tensor = self.down(hidden)
        return down


class OwnModel(nn.Module):
    """FFNs on a residual stream, each of its own kind; tokens do not see one another."""

    def __init__(self, *ffns: OwnFFN) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ffns)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def own_model(*gated: bool, activation: str = "gelu", seed: int = 0) -> OwnModel:
    """Return a seeded model with one FFN for each argument, in eval mode."""
    torch.manual_seed(seed)
    model = OwnModel(*(OwnFFN(activation, gated=flag) for flag in gated)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(scale * torch.randn(parameter.shape))
    return model


def rows(batch: int = 8, length: int = 64, seed: int = 0, width: int = WIDTH) -> Tensor:
    """Return random activations [B, T, d], correlated and off centre as real ones are."""
    generator = torch.Generator().manual_seed(1000 + seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(7)) / width**0.5
    return (
        torch.randn(batch, length, width, generator=generator) @ (mixing + torch.eye(width)) + 0.2
    )


def stream(count: int = 3) -> list[Tensor]:
    """Return several batches of one shape."""
    return [rows(seed=seed) for seed in range(count)]


def ffn_config(
    *, holdout: float = 0.1, ridge: float | str = "auto", max_nmse: float | None = 1e9, **ffn: Any
) -> nbl.Config:
    """Return a configuration by the options of its FFN part; all sites, unless told otherwise."""
    selected = {"count", "layers"} & ffn.keys()
    limit = None if selected and max_nmse == 1e9 else max_nmse
    options = nbl.FFN(max_nmse=limit, **{"rank_by": "nmse", **ffn})
    return nbl.Config(attention=None, ffn=options, holdout=holdout, ridge=ridge)  # type: ignore[arg-type]


def folded(model: nn.Module, batches: Any = None, **options: Any) -> nbl.Plan:
    """Calibrate the FFNs of a small model, on ``stream()`` by default."""
    given = stream() if batches is None else batches
    return nbl.calibrate(model, given, ffn_config(**options), progress=False)


def compiled_ffn(model: nn.Module, plan: nbl.Plan | None = None, **options: Any) -> Any:
    """Compile without lowering, unless told otherwise; ``dynamic`` goes to ``torch.compile``."""
    dynamic = options.pop("dynamic", None)
    if plan is not None:
        options["plan"] = plan
    given = {"lowering": "eager", **options}
    return torch.compile(model, backend="nbl", dynamic=dynamic, options=given)
