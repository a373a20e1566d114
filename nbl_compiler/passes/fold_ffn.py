"""Put the plan's folded FFNs in place of the dense ones (TARDIS, arXiv 2501.10054).

    before   y = act(x W1ᵀ + b1) W2ᵀ + b2,  or  y = (act(x W1ᵀ) * (x W_upᵀ)) W2ᵀ
    after    r = x [W1_K | W_up_K | M]ᵀ;  y = (act(r_1) * r_2) V_Kᵀ + r_3            keep+fold
    after    y = nbl::guarded_ffn(x, …)[0], plus the kept neurons as above           guarded

x [..., d], W1 [f, d], W2 [o, f], K the k kept neurons, M [o, d], V_K [o, k], y [..., o]. The kept
rows and the map are stacked into one matrix, so that x is multiplied once. They are copies: the
model's own weights are no longer read (``nbl_compiler.release`` lets go of them).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from nbl_compiler.errors import PlanMismatchError
from nbl_compiler.ffn.guarded import restore
from nbl_compiler.guard_counters import accumulate
from nbl_compiler.passes.base import PassReport
from nbl_compiler.passes.emit import Emitter
from nbl_compiler.passes.ffn_sites import FFNMatch, load_ffn_matches, store_folded
from nbl_compiler.passes.ffn_weights import ffn_weights, parameter_value
from nbl_compiler.passes.graph_tools import example_value
from nbl_compiler.passes.lifting import lift
from nbl_compiler.passes.rewrite_sites import check_dtype, check_shapes, rewrite_sites
from nbl_compiler.plans import Plan, Site
from nbl_compiler.released_weights import refuse_released
from nbl_compiler.solvers.folding import FFNWeights


@dataclass(frozen=True)
class FoldFFN:
    """Rewrite every matched FFN site that the plan decided to rewrite.

    Raises (when called):
        PlanMismatchError: if a site's tensors do not have the shape of the site.
        UnsupportedDtypeError: if the model computes in a dtype without a floating matmul here.
    """

    plan: Plan
    name: str = "fold_ffn"

    def __call__(self, graph_module: GraphModule) -> PassReport:
        found = load_ffn_matches(graph_module).found
        done, report = rewrite_sites(graph_module, self.plan, "ffn", found, rewrite)
        store_folded(graph_module, done)
        return report


def rewrite(graph_module: GraphModule, match: FFNMatch, site: Site, plan: Plan) -> Node:
    """Replace one site's output by the folded FFN and return the new node."""
    like, target = example_value(match.hidden), example_value(match.output)
    assert isinstance(like, Tensor)
    assert isinstance(target, Tensor)
    weights = ffn_weights(match, parameter_value)
    _check(site, match, like, target, weights)
    source = _Source(
        graph_module, site, plan, weights, tuple(map(parameter_value, match.weights)), like
    )
    meta = {**match.output.meta, "nbl": {"site": site.name, "pass": "fold_ffn"}}
    graph = graph_module.graph
    with graph.inserting_before(match.output.next):
        emitter = Emitter(graph, meta)
        if site.details["form"] == "guarded":
            output = _guarded(emitter, source, match.hidden)
        else:
            output = _keep_and_fold(emitter, source, match.hidden)
        if target.dtype != like.dtype:
            output = emitter.call(Tensor.to, output, target.dtype)
    match.output.replace_all_uses_with(output)
    return output


@dataclass(frozen=True)
class _Source:
    """Where one site's tensors come from: the plan, and the model's weights."""

    graph_module: GraphModule
    site: Site
    plan: Plan
    weights: FFNWeights | None
    parameters: tuple[nn.Parameter | None, ...]
    like: Tensor

    def lift(self, name: str, make: Callable[[], Tensor]) -> Node:
        """Bring a tensor into the graph; it is made once for all graphs of the plan."""
        key = (self.site.name, name, self.like.dtype, self.like.device)
        tensor = self.plan.remember(key, make)
        return lift(self.graph_module, f"{self.site.name}_{name}", tensor)

    def cast(self, name: str) -> Tensor:
        """Return a stored tensor in the dtype and on the device of the model."""
        return self.site.tensors[name].to(self.like.device, self.like.dtype)

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


def _keep_and_fold(emitter: Emitter, source: _Source, x: Node) -> Node:
    tensors = source.site.tensors
    folded = "weight" in tensors
    if source.kept == 0:
        weight = source.lift("weight", lambda: source.cast("weight"))
        bias = source.lift("bias", lambda: source.cast("bias"))
        return emitter.call(F.linear, x, weight, bias)
    hidden, rest = _kept_hidden(emitter, source, x, folded=folded)
    down = source.lift("down", lambda: source.cast("down"))
    if rest is not None:
        return emitter.call(torch.add, emitter.call(F.linear, hidden, down), rest)
    bias = source.lift("bias", lambda: source.cast("bias"))
    return emitter.call(F.linear, hidden, down, bias)


def _kept_hidden(
    emitter: Emitter, source: _Source, x: Node, *, folded: bool
) -> tuple[Node, Node | None]:
    """Return the kept neurons' values [..., k], and M x + b if the map is stacked below them."""
    k, details = source.kept, source.site.details
    name = "rows" if folded else "kept_rows"
    rows = source.lift(name, lambda: _stacked(source, folded=folded)[0])
    bias = source.lift(f"{name}_bias", lambda: _stacked(source, folded=folded)[1])
    made = emitter.call(F.linear, x, rows, bias)

    def part(start: int, stop: int | None) -> Node:
        return emitter.call(operator.getitem, made, (Ellipsis, slice(start, stop)))

    hidden = emitter.activation(details["activation"], part(0, k))
    first = k
    if details["gated"]:
        hidden = emitter.call(torch.mul, hidden, part(k, 2 * k))
        first = 2 * k
    return hidden, part(first, None) if folded else None


def _stacked(source: _Source, *, folded: bool) -> tuple[Tensor, Tensor]:
    """Return [W1_K | W_up_K | M] as rows [n, d], and their biases [n]."""
    compact = source.dense.select(source.site.tensors["kept"])
    parts = [(compact.w1, compact.b1)]
    if compact.w_up is not None:
        parts.append((compact.w_up, compact.b_up))
    if folded:
        parts.append((source.cast("weight"), source.cast("bias")))
    biases = [w.new_zeros(w.shape[0]) if b is None else b for w, b in parts]
    return torch.cat([w for w, _ in parts]).contiguous(), torch.cat(biases)


def _guarded(emitter: Emitter, source: _Source, x: Node) -> Node:
    """Add the guarded op, its counters, and the kept neurons."""
    like, site = source.like, source.site
    key = (site.name, "guarded", like.dtype, like.device)
    guarded = source.plan.remember(key, lambda: restore(source.dense, site.tensors, site.details))
    arguments = [_argument(source, f.name, getattr(guarded, f.name)) for f in fields(guarded)]
    made = emitter.call(torch.ops.nbl.guarded_ffn.default, x, *arguments)
    output, outliers, dense = (emitter.call(operator.getitem, made, i) for i in range(3))
    counters = lift(
        source.graph_module, f"{site.name}_counters", source.plan.counters(site.name, like.device)
    )
    emitter.call(accumulate, counters, outliers, dense)
    if source.kept == 0:
        return output
    hidden, _ = _kept_hidden(emitter, source, x, folded=False)
    columns = source.lift("down", lambda: _kept_columns(source))
    return emitter.call(torch.add, emitter.call(F.linear, hidden, columns), output)


def _kept_columns(source: _Source) -> Tensor:
    return source.dense.select(source.site.tensors["kept"]).w2.contiguous()


def _argument(source: _Source, name: str, value: object) -> object:
    """Return an op's argument with tensors brought into the graph."""
    if isinstance(value, list):
        return [_argument(source, f"{name}_{i}", item) for i, item in enumerate(value)]
    if not isinstance(value, Tensor):
        return value
    return lift(source.graph_module, f"{source.site.name}_{name}", value)


def _check(
    site: Site, match: FFNMatch, like: Tensor, target: Tensor, weights: FFNWeights | None
) -> None:
    check_dtype(site, like)
    if weights is None:
        raise PlanMismatchError(
            f"the weights of {site.name} are not parameters of this model; calibrate this model"
        )
    facts = {
        "neurons": weights.neurons,
        "activation": match.activation,
        "gated": match.gate is not None,
    }
    for name, found in facts.items():
        if site.details.get(name) != found:
            raise PlanMismatchError(
                f"the plan folds {site.name} with {name} {site.details.get(name)!r}, the model has "
                f"{found!r}; calibrate this model"
            )
    check_folded_shapes(site, like.shape[-1], target.shape[-1])


def check_folded_shapes(site: Site, width_in: int, width_out: int) -> None:
    """Raise ``PlanMismatchError`` if a folded FFN's tensors do not fit what its details say."""
    details = site.details
    neurons, kept = int(details["neurons"]), int(details["kept"])
    wanted: dict[str, tuple[object, ...]] = {"bias": (width_out,)}
    if kept < neurons:
        wanted["weight"] = (width_out, width_in)
    if kept:
        wanted["kept"] = (kept,)
        if details["form"] == "keep+fold":
            wanted["down"] = (width_out, kept)
    if details["form"] == "guarded":
        names = ["up_slope", "intercept", *(["gate_slope"] if details["gated"] else [])]
        if details["guard"] == "exact":
            names += ["low", "high"]
        wanted |= dict.fromkeys(names, (neurons - kept,))
    check_shapes(site, wanted)
