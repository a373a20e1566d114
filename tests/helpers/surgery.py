"""The oracle: a plan applied by plain module surgery, without a compiler."""

from __future__ import annotations

import copy
from typing import Any

import torch.nn.functional as F
from helpers.naive_states import captured_attention, naive_mix, naive_states
from torch import Tensor, nn

from nbl_compiler.plans import Plan, Site
from nbl_compiler.value_states import gates_of, states_of


class LinearAttention(nn.Module):
    """Stands where an attention module stood and answers with the site's linear map.

    The old module still runs, for what a block passes on besides the hidden state (T5's position
    bias) and to keep an ordinary cache in step; its attention output is thrown away.
    """

    def __init__(self, old: nn.Module, site: Site, block: nn.Module) -> None:
        super().__init__()
        self.old, self.site = old, site
        self._stream: Tensor | None = None
        if site.details["input"] == "residual":
            block.register_forward_pre_hook(self._remember_stream, with_kwargs=True)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # blocks read attributes of their attention (is_sliding, layer_idx)
            return getattr(super().__getattr__("old"), name)

    def _remember_stream(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._stream = args[0] if args else kwargs["hidden_states"]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        with captured_attention() as mixed:
            others = self.old(*args, **kwargs)[1:]
        source = hidden if self._stream is None else self._stream
        weight, bias = (self.site.tensors[k].to(source.dtype) for k in ("weight", "bias"))
        mapped = F.linear(source, weight, bias)
        states = states_of(self.site.details)
        gates = gates_of(self.site.tensors)
        if gates is not None:
            own = self._own_heads(mixed.values)
            read = naive_mix(own, mixed.allowed, hidden, gates).to(source.dtype)
            mapped = mapped + read @ self.site.tensors["mix"].T.to(source.dtype)
        elif states:
            read = naive_states(self._own_heads(mixed.values), mixed.allowed, states)
            vectors = read.unflatten(-1, (states.vectors, -1)).to(source.dtype)
            maps = [*self.site.tensors.get("taps", ()), *self.site.tensors.get("averages", ())]
            for index, each in enumerate(maps):
                mapped = mapped + vectors[:, :, index] @ each.T.to(source.dtype)
        return self._finish(mapped, hidden, args), *others

    def _own_heads(self, values: Tensor) -> Tensor:
        """Return the values [B, H, T, D] without heads that repeat others."""
        if "mix" in self.site.tensors:
            return values  # a query head's own, repeated or not
        maps = self.site.tensors.get("taps", self.site.tensors.get("averages"))
        heads = maps.shape[-1] // values.shape[-1]
        return values[:, :: values.shape[1] // heads]

    def _finish(self, mapped: Tensor, hidden: Tensor, args: tuple) -> Tensor:
        """Add what the module itself does behind its output projection."""
        if type(self.old).__name__ == "BloomAttention":
            return mapped + args[1]  # hidden_states, residual, …
        output = getattr(self.old, "output", None)  # BERT and RoBERTa: residual and norm
        return mapped if output is None else output.LayerNorm(mapped + hidden)


def linearize_by_surgery(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy of the model whose linearized attention modules are replaced."""
    result = copy.deepcopy(model)
    for site in plan.rewritten:
        parent, name = site.name.rsplit(".", 1)
        block = result.get_submodule(parent)
        setattr(block, name, LinearAttention(block.get_submodule(name), site, block))
    return result
