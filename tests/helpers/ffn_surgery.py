"""The oracle of folded FFNs: a plan applied by plain module surgery, token by token, in float64.

It reads the plan's tensors and the model's own weights, and nothing of how the compiler uses them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from helpers.surgery import linearize_by_surgery
from torch import Tensor, nn

from nbl_compiler.plans import Plan, Site

Activation = Callable[[Tensor], Tensor]


def gelu_tanh(z: Tensor) -> Tensor:
    """GELU by its tanh formula."""
    return F.gelu(z, approximate="tanh")


@dataclass(frozen=True)
class Layout:
    """Where a family keeps its FFN, as paths inside the module that the site is named after.

    Args:
        up: The projection the activation acts on (plain), or its factor (gated).
        down: The projection back.
        activation: σ.
        gate: The projection the activation acts on (gated).
        fused: ``up`` computes the gate's rows, then up's.
        transposed: Weights are stored as [in, out].
        stand_in: What to replace by the folded FFN; empty: the module itself.
        bypassed: What must then do nothing.
    """

    up: str
    down: str
    activation: Activation
    gate: str = ""
    fused: bool = False
    transposed: bool = False
    stand_in: str = ""
    bypassed: tuple[str, ...] = ()


_GLU = Layout("up_proj", "down_proj", F.silu, gate="gate_proj")
LAYOUTS = {
    "llama": _GLU,
    "gemma3": replace(_GLU, activation=gelu_tanh),
    "phi3": Layout("gate_up_proj", "down_proj", F.silu, fused=True),
    "gpt2": Layout("c_fc", "c_proj", gelu_tanh, transposed=True),
    "gpt_neox": Layout("dense_h_to_4h", "dense_4h_to_h", F.gelu),
    "opt": Layout("fc1", "fc2", F.relu, stand_in="fc1", bypassed=("activation_fn", "fc2")),
    "bert": Layout(
        "intermediate.dense",
        "output.dense",
        F.gelu,
        stand_in="intermediate",
        bypassed=("output.dense",),
    ),
    "own gelu": Layout("up", "down", F.gelu),
    "own relu": Layout("up", "down", F.relu),
    "own gated": Layout("up", "down", F.gelu, gate="gate"),
}


@dataclass(frozen=True)
class Weights:
    """An FFN's weights in float64, rows of ``w1`` (and ``w_up``) and columns of ``w2`` a neuron."""

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    w_up: Tensor | None
    b_up: Tensor | None

    def select(self, neurons: Tensor) -> Weights:
        """Return some neurons' weights (by indices or a mask); b2 stays."""
        up = None if self.w_up is None else self.w_up[neurons]
        up_bias = None if self.b_up is None else self.b_up[neurons]
        return Weights(
            self.w1[neurons], self.b1[neurons], self.w2[:, neurons], self.b2, up, up_bias
        )


def read_weights(module: nn.Module, layout: Layout) -> Weights:
    """Return the weights of the FFN in a site's module."""

    def of(path: str) -> tuple[Tensor, Tensor]:
        layer = module.get_submodule(path)
        weight = layer.weight.detach().double()
        weight = weight.T if layout.transposed else weight
        bias = getattr(layer, "bias", None)
        zeros = torch.zeros(weight.shape[0], dtype=torch.float64)
        return weight, zeros if bias is None else bias.detach().double()

    (w2, b2), (up, b_up) = of(layout.down), of(layout.up)
    if layout.fused:
        half = up.shape[0] // 2
        return Weights(up[:half], b_up[:half], w2, b2, up[half:], b_up[half:])
    if not layout.gate:
        return Weights(up, b_up, w2, b2, None, None)
    gate, b_gate = of(layout.gate)
    return Weights(gate, b_gate, w2, b2, up, b_up)


class FoldedFFN(nn.Module):
    """Computes what a plan's site stands for, one token after the other.

    ``counts`` holds, per token seen, how many neurons were flagged and whether it ran dense.
    """

    def __init__(self, site: Site, weights: Weights, activation: Activation) -> None:
        super().__init__()
        self._site, self._all, self._act = site, weights, activation
        self._plan = {name: tensor.double() for name, tensor in site.tensors.items()}
        neurons = weights.w1.shape[0]
        self._kept = site.tensors.get("kept", torch.zeros(0, dtype=torch.int64))
        left = torch.ones(neurons, dtype=torch.bool)
        left[self._kept] = False
        self._dense, self._folded = weights.select(self._kept), weights.select(left)
        self.counts: list[tuple[int, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1]).double()
        guarded = self._site.details["form"] == "guarded"
        compute = self._guarded if guarded else self._keep_and_fold
        made = [compute(token) for token in tokens]
        return torch.stack(made).reshape(*x.shape[:-1], -1).to(x.dtype)

    def _neurons(self, weights: Weights, x: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """Return (g, u, h) of some neurons; a plain FFN has no g."""
        first = weights.w1 @ x + weights.b1
        if weights.w_up is None or weights.b_up is None:
            return None, first, self._act(first)
        up = weights.w_up @ x + weights.b_up
        return first, up, self._act(first) * up

    def _keep_and_fold(self, x: Tensor) -> Tensor:
        y = self._plan["bias"]
        if "weight" in self._plan:
            y = y + self._plan["weight"] @ x
        if self._kept.numel():
            y = y + self._plan["down"] @ self._neurons(self._dense, x)[2]
        return y

    def _guarded(self, x: Tensor) -> Tensor:
        """y = FFN_K(x) + C x + B + Σ_{i outlier} (h_i − ĥ_i) W2[:, i], or all of it dense."""
        gate, up, hidden = self._neurons(self._folded, x)
        chosen, flagged, dense = self._outliers(x, up)
        self.counts.append((flagged, dense))
        if dense:
            return self._all.w2 @ self._neurons(self._all, x)[2] + self._all.b2
        y = self._plan["weight"] @ x + self._plan["bias"]
        y = y + self._dense.w2 @ self._neurons(self._dense, x)[2]
        if self._site.details["values"] == "predicted":
            gate, up, hidden = self._seen(x)
        fitted = self._fitted(gate, up)
        for neuron in chosen:
            y = y + (hidden[neuron] - fitted[neuron]) * self._folded.w2[:, neuron]
        return y

    def _fitted(self, gate: Tensor | None, up: Tensor) -> Tensor:
        fitted = self._plan["up_slope"] * up + self._plan["intercept"]
        return fitted if gate is None else fitted + self._plan["gate_slope"] * gate

    def _outliers(self, x: Tensor, up: Tensor) -> tuple[list[int], int, bool]:
        """Return (neurons to put right, number of flagged neurons, whether the token is dense)."""
        details, capacity = self._site.details, self._site.details["capacity"]
        seen, slack = self._predicted(x)
        if details["guard"] == "exact":
            low, high = self._plan["low"], self._plan["high"]
            outside = ((up < low) | (up > high)).nonzero().view(-1).tolist()
            flagged = int(((seen - slack < low) | (seen + slack > high)).sum())
            return outside, flagged, flagged > capacity
        gate, up, hidden = self._seen(x)
        score = (hidden - self._fitted(gate, up)).abs() * self._folded.w2.norm(dim=0)
        return score.topk(min(capacity, score.numel())).indices.tolist(), score.numel(), False

    def _seen(self, x: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """Return (g, u, h) as the guard sees them."""
        seen, _ = self._predicted(x)
        if self._folded.w_up is None:
            return None, seen, self._act(seen)
        gate, up = seen.chunk(2)
        return gate, up, self._act(gate) * up

    def _predicted(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return pre-activations as the guard sees them (the gate's first), and their slack."""
        kind = self._site.details["predictor"]
        given = [self._plan[f"predictor_{i}"] for i in range(len(self._plan)) if
                 f"predictor_{i}" in self._plan]  # fmt: skip
        no_slack = torch.zeros((), dtype=torch.float64)
        if kind == "none":
            gate, up, _ = self._neurons(self._folded, x)
            return (up if gate is None else torch.cat([gate, up])), no_slack
        if kind == "low_rank":
            basis, coefficients, offset = given
            return coefficients @ (basis @ x) + offset, no_slack
        codes, scale, shift, offset, *certificate = given
        bits = int(kind.removeprefix("quantized_"))
        rows = _codes(codes.long(), bits, x.numel()) * scale[:, None] + shift[:, None]
        if not certificate:
            return rows @ x + offset, no_slack
        radius, rounding, centre = certificate
        distance, norm = ((1 + 2**-10) * v.norm() for v in (x - centre, x))  # as certified
        return rows @ x + offset, radius * distance + rounding * (norm + 1)


def _codes(packed: Tensor, bits: int, width: int) -> Tensor:
    """Unpack float64 [n, width]: column j is bits ``bits * (j // bytes)`` of byte ``j % bytes``."""
    count = packed.shape[1]
    columns = [(packed[:, j % count] >> (bits * (j // count))) % 2**bits for j in range(width)]
    return torch.stack(columns, dim=1).double()


def fold_by_surgery(model: nn.Module, plan: Plan, layout: Layout) -> nn.Module:
    """Return a copy of the model with all that the plan rewrites, attention included, replaced."""
    attention = tuple(site for site in plan.sites if site.kind == "attention")
    result = linearize_by_surgery(copy.deepcopy(model), replace(plan, sites=attention))
    for site in plan.rewritten:
        if site.kind == "ffn":
            weights = read_weights(model.get_submodule(site.name), layout)
            _replace(result, site.name, FoldedFFN(site, weights, layout.activation), layout)
    return result


def _replace(model: nn.Module, name: str, folded: FoldedFFN, layout: Layout) -> None:
    module = model.get_submodule(name)
    for path in layout.bypassed:
        module.set_submodule(path, nn.Identity())
    if layout.stand_in:
        module.set_submodule(layout.stand_in, folded)
    else:
        model.set_submodule(name, folded)


def folded_parts(model: nn.Module) -> list[FoldedFFN]:
    """Return the folded FFNs of a model after surgery, in its order."""
    return [module for module in model.modules() if isinstance(module, FoldedFFN)]
