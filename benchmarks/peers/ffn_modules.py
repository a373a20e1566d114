"""The FFNs of a model by their modules, for recipes that replace modules.

``nbl`` finds FFNs in the traced graph; peers are module surgery, so they need module names.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from peers.does_not_apply import DoesNotApply

# (projections that read x, the gate first; the down projection; the activation)
_LAYOUTS = (
    (("gate_proj", "up_proj"), "down_proj", "act_fn"),  # Llama, Qwen, Gemma, Mistral
    (("intermediate.dense",), "output.dense", "intermediate.intermediate_act_fn"),  # BERT
    (("fc1",), "fc2", "activation_fn"),  # OPT, Phi
)


@dataclass(frozen=True)
class FFNModules:
    """One FFN with f neurons: y = W2 σ(W1 x), or W2 (σ(W_gate x) ⊙ W_up x).

    Args:
        name: Path of the module that holds it.
        holder: That module.
        rows: Paths below it of the projections [f, d], the gate first.
        down: Path below it of the down projection [d, f].
        activation: Path below it of σ.
    """

    name: str
    holder: nn.Module
    rows: tuple[str, ...]
    down: str
    activation: str

    @property
    def gated(self) -> bool:
        """Whether the activation is multiplied by an up projection."""
        return len(self.rows) == 2

    @property
    def neurons(self) -> int:
        """f."""
        return self.linear(self.down).in_features

    @property
    def parameters(self) -> int:
        """Weights of all its projections."""
        return sum(self.linear(path).weight.numel() for path in (*self.rows, self.down))

    def linear(self, path: str) -> nn.Linear:
        """Return one of the projections."""
        module = self.holder.get_submodule(path)
        assert isinstance(module, nn.Linear)
        return module

    def replace(self, path: str, module: nn.Module) -> None:
        """Put another module in the place of one."""
        self.holder.set_submodule(path, module)

    def hidden(self, x: Tensor) -> Tensor:
        """Return what the down projection reads, [tokens, d] to [tokens, f]."""
        first, *up = (F.linear(x, m.weight, m.bias) for m in map(self.linear, self.rows))
        activated = self.holder.get_submodule(self.activation)(first)
        return activated * up[0] if up else activated


def find_ffns(model: nn.Module) -> list[FFNModules]:
    """Return the FFNs of a model, in its order.

    Raises:
        DoesNotApply: if there is none of a known layout.
    """
    found = [
        FFNModules(name, module, *layout)
        for name, module in model.named_modules()
        for layout in _LAYOUTS
        if all(_has_linear(module, path) for path in (*layout[0], layout[1]))
    ]
    if not found:
        raise DoesNotApply(f"{type(model).__name__} has no FFN of a layout that peers know")
    return found


def _has_linear(module: nn.Module, path: str) -> bool:
    for name in path.split("."):
        if name not in module._modules:
            return False
        module = module._modules[name]  # type: ignore[assignment]
    return isinstance(module, nn.Linear)
