"""The oracle: a plan applied by plain module surgery, without a compiler."""

from __future__ import annotations

import copy
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from nbl_compiler.plan import Plan, Site


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
        others = self.old(*args, **kwargs)[1:]
        source = hidden if self._stream is None else self._stream
        weight, bias = (self.site.tensors[k].to(source.dtype) for k in ("weight", "bias"))
        return self._finish(F.linear(source, weight, bias), hidden, args), *others

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
