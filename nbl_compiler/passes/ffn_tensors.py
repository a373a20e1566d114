"""The tensors of one folded FFN, made once for all graphs of a plan and brought into each.

Kept rows are copies of the model's own. Where those are held as int8 they are copied bit for bit:
rounding the dequantized row again would not give the same codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from nbl_compiler.int8_weights import Int8Matrix, int8_of, is_quantized, quantize_rows, stacked
from nbl_compiler.passes.lifting import lift
from nbl_compiler.passes.matrices import lift_matrix
from nbl_compiler.plans import Plan, Site
from nbl_compiler.released_weights import refuse_released
from nbl_compiler.solvers.folding import FFNWeights

Made = TypeVar("Made")


@dataclass(frozen=True)
class FFNTensors:
    """Where one site's tensors come from: the plan, and the model's weights.

    Args:
        graph_module: The graph that they are brought into.
        site: The site.
        plan: Its plan, which keeps what is made here.
        weights: The model's own, or None if they are not known.
        parameters: The parameters that the region reads.
        like: A tensor of the dtype and on the device that the site computes in.
        int8: Whether matrices are held as int8.
    """

    graph_module: GraphModule
    site: Site
    plan: Plan
    weights: FFNWeights | None
    parameters: tuple[nn.Parameter | None, ...]
    like: Tensor
    int8: bool

    def lift(self, name: str, make: Callable[[], Tensor]) -> Node:
        """Bring a tensor into the graph; it is made once for all graphs of the plan."""
        return lift(self.graph_module, f"{self.site.name}_{name}", self._once(name, make))

    def matrix(self, name: str, make: Callable[[], Sequence[Tensor | Int8Matrix]]) -> list[Node]:
        """Bring rows of a matrix into the graph, one below the other; as int8 if asked for."""
        join = self._joined_int8 if self.int8 else self._joined
        made: Tensor | Int8Matrix = self._once(name, lambda: join(make()))
        return lift_matrix(self.graph_module, f"{self.site.name}_{name}", made)

    def _once(self, name: str, make: Callable[[], Made]) -> Made:
        # What is made of quantized weights is no good for the same model before quantization.
        how = (self.like.dtype, self.like.device, self.int8, self.quantized)
        return self.plan.remember((self.site.name, name, *how), make)

    def _joined(self, parts: Sequence[Tensor | Int8Matrix]) -> Tensor:
        dtype, device = self.like.dtype, self.like.device
        plain = [p if isinstance(p, Tensor) else p.dequantized() for p in parts]
        return torch.cat([part.to(device, dtype) for part in plain]).contiguous()

    def _joined_int8(self, parts: Sequence[Tensor | Int8Matrix]) -> Int8Matrix:
        device = self.like.device
        return stacked(quantize_rows(p.to(device)) if isinstance(p, Tensor) else p for p in parts)

    def kept_rows(self, weight: Tensor) -> Tensor | Int8Matrix:
        """Return the rows of a projection that belong to the kept neurons, as they are held."""
        kept = self.site.tensors["kept"].to(weight.device)
        if is_quantized(weight):
            return int8_of(weight, f"a weight of {self.site.name}").rows(kept)
        return weight.index_select(0, kept)

    def cast(self, name: str) -> Tensor:
        """Return a stored tensor in the dtype and on the device of the model."""
        return self.site.tensors[name].to(self.like.device, self.like.dtype)

    @property
    def quantized(self) -> bool:
        """Whether some of the model's own weights are quantized."""
        return any(map(is_quantized, self.parameters))

    @property
    def dense(self) -> FFNWeights:
        """The model's own weights.

        Raises:
            WeightsReleasedError: if they were released for another plan.
        """
        assert self.weights is not None
        refuse_released(self.parameters, f"folding {self.site.name} by this plan")
        return self.weights

    @property
    def kept(self) -> int:
        """k, how many neurons stay dense."""
        return int(self.site.details["kept"])
