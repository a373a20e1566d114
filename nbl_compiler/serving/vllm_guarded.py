"""A folded FFN with an outlier guard in vLLM's decoder layers.

    y = FFN_K(x) + nbl::guarded_ffn(x, …)        K the kept neurons

The op decides token by token, so what a token gets does not depend on the tokens in its batch. To
vLLM's compiler it is one opaque call: on GPUs its Triton kernels run, on CPUs its reference, which
computes all neurons and so gains nothing over the dense FFN.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._triton import has_triton

from nbl_compiler.ffn.guarded import restore
from nbl_compiler.lowering.guarded_site import ACTIVATIONS, GuardedFFN
from nbl_compiler.plans import Site
from nbl_compiler.solvers.folding import FFNWeights

_FIELDS = tuple(field.name for field in fields(GuardedFFN))


class GuardedFFNLayer(nn.Module):
    """The dense projections until the weights are loaded, then the guarded op's tensors.

    Args:
        gate_up_proj: vLLM's merged projection, [2 f, d].
        down_proj: vLLM's down projection, [d, f].
        site: The plan's site.
    """

    folded: Tensor
    kept_w1: Tensor
    kept_b1: Tensor | None
    kept_w_up: Tensor
    kept_b_up: Tensor | None
    kept_w2: Tensor

    def __init__(self, gate_up_proj: nn.Module, down_proj: nn.Module, site: Site) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj
        self.activate = ACTIVATIONS[site.details["activation"]]
        self.kept = int(site.details["kept"])
        self.settings: dict[str, Any] = {}
        self.predictors = 0

    def apply_plan(self, site: Site) -> None:
        """Take what the op needs of the loaded weights, and let go of the projections."""
        weights = _loaded(self.gate_up_proj, self.down_proj, site.details["activation"])
        guarded = restore(weights, site.tensors, site.details)
        for name in _FIELDS:
            value = getattr(guarded, name)
            if isinstance(value, Tensor):
                self._hold(name, value)
            elif name == "predictor":
                for i, tensor in enumerate(value):
                    self._hold(f"predictor_{i}", tensor)
                self.predictors = len(value)
            else:
                self.settings[name] = value
        if self.kept:
            compact = weights.select(site.tensors["kept"])
            for name in ("w1", "b1", "w_up", "b_up", "w2"):
                self._hold(f"kept_{name}", getattr(compact, name))
        del self.gate_up_proj, self.down_proj
        if self.folded.is_cuda and has_triton():
            from nbl_compiler.lowering import triton_guarded_ffn  # noqa: F401  registers its kernels

    def _hold(self, name: str, tensor: Tensor | None) -> None:
        self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return y [tokens, d] for x [tokens, d]."""
        y: Tensor = torch.ops.nbl.guarded_ffn(x, *[self._argument(name) for name in _FIELDS])[0]
        if self.kept:
            gate = self.activate(F.linear(x, self.kept_w1, self.kept_b1))
            hidden = gate * F.linear(x, self.kept_w_up, self.kept_b_up)
            y = y + F.linear(hidden, self.kept_w2)
        return y

    def _argument(self, name: str) -> Any:
        if name == "predictor":
            return [getattr(self, f"predictor_{i}") for i in range(self.predictors)]
        return self.settings[name] if name in self.settings else getattr(self, name)


def _loaded(gate_up_proj: Any, down_proj: Any, activation: str) -> FFNWeights:
    gate, up = gate_up_proj.weight.detach().chunk(2)
    biases = (None, None) if gate_up_proj.bias is None else gate_up_proj.bias.detach().chunk(2)
    down_bias = None if down_proj.bias is None else down_proj.bias.detach()
    return FFNWeights(
        activation, gate, down_proj.weight.detach(), biases[0], down_bias, up, biases[1]
    )
