"""Put the plan's folded FFNs in place of the dense ones (TARDIS, arXiv 2501.10054).

    before   y = act(x W1ᵀ + b1) W2ᵀ + b2,  or  y = (act(x W1ᵀ) * (x W_upᵀ)) W2ᵀ
    after    r = x [W1_K | W_up_K | M]ᵀ;  y = (act(r_1) * r_2) V_Kᵀ + r_3            keep+fold
    after    y = nbl::guarded_ffn(x, …)[0], plus the kept neurons as above           guarded

x [..., d], W1 [f, d], W2 [o, f], K the k kept neurons, M [o, d], V_K [o, k], y [..., o]. The kept
rows and the map are stacked into one matrix, so that x is multiplied once. They are copies: the
model's own weights are no longer read (``nbl_compiler.release`` lets go of them). Where these are
held as int8, so are the copies (``matrices.py``), the kept rows bit for bit.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from nbl_compiler.errors import PlanMismatchError, UnsupportedDtypeError
from nbl_compiler.ffn.guarded import restore
from nbl_compiler.guard_counters import accumulate
from nbl_compiler.int8_weights import Int8Matrix, Quantize
from nbl_compiler.passes.base import PassReport
from nbl_compiler.passes.emit import Emitter
from nbl_compiler.passes.ffn_sites import FFNMatch, load_ffn_matches, store_folded
from nbl_compiler.passes.ffn_tensors import FFNTensors
from nbl_compiler.passes.ffn_weights import ffn_weights, parameter_value
from nbl_compiler.passes.graph_tools import example_value, traced_size
from nbl_compiler.passes.lifting import lift
from nbl_compiler.passes.matrices import emit_linear, holds_int8, rounding_notes
from nbl_compiler.passes.rewrite_sites import check_dtype, check_shapes, rewrite_sites
from nbl_compiler.plans import Plan, Site
from nbl_compiler.solvers.folding import FFNWeights


@dataclass(frozen=True)
class FoldFFN:
    """Rewrite every matched FFN site that the plan decided to rewrite.

    Raises (when called):
        PlanMismatchError: if a site's tensors do not have the shape of the site.
        UnsupportedDtypeError: if the model computes in a dtype without a floating matmul here, or
            a guarded site's weights are quantized.
    """

    plan: Plan
    name: str = "fold_ffn"
    quantize: Quantize = "auto"
    guard_tokens: int | None = None

    def __call__(self, graph_module: GraphModule) -> PassReport:
        found = load_ffn_matches(graph_module).found
        rewriting = partial(rewrite, quantize=self.quantize)
        done, report = rewrite_sites(graph_module, self.plan, "ffn", found, rewriting, self._leave)
        store_folded(graph_module, done)
        return replace(report, notes=rounding_notes(self.plan, done, "ffn", self.quantize))

    def _leave(self, match: FFNMatch, site: Site) -> str | None:
        """Say that a guarded FFN stays dense where a graph runs more tokens than guards are for.

        A symbolic number of tokens counts as the one that was traced: both forms are right.
        """
        if self.guard_tokens is None or not site.guarded:
            return None
        hidden = example_value(match.hidden)
        assert isinstance(hidden, Tensor)
        tokens = math.prod(map(traced_size, hidden.shape[:-1]))
        if tokens <= self.guard_tokens:
            return None
        return f"runs {tokens:,} tokens at once, more than guard_tokens={self.guard_tokens}"


def rewrite(
    graph_module: GraphModule,
    match: FFNMatch,
    site: Site,
    plan: Plan,
    quantize: Quantize = "auto",
) -> Node:
    """Replace one site's output by the folded FFN and return the new node."""
    like, target = example_value(match.hidden), example_value(match.output)
    assert isinstance(like, Tensor)
    assert isinstance(target, Tensor)
    weights = ffn_weights(match, parameter_value)
    _check(site, match, like, target, weights)
    parameters = tuple(map(parameter_value, match.weights))
    int8 = holds_int8(site, match.weights, quantize)
    source = FFNTensors(graph_module, site, plan, weights, parameters, like, int8)
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


def _keep_and_fold(emitter: Emitter, source: FFNTensors, x: Node) -> Node:
    tensors = source.site.tensors
    folded = "weight" in tensors
    if source.kept == 0:
        weight = source.matrix("weight", lambda: [tensors["weight"]])
        bias = source.lift("bias", lambda: source.cast("bias"))
        return emit_linear(emitter, x, weight, bias)
    hidden, rest = _kept_hidden(emitter, source, x, folded=folded)
    down = source.matrix("down", lambda: [tensors["down"]])
    if rest is not None:
        return emitter.call(torch.add, emit_linear(emitter, hidden, down, None), rest)
    bias = source.lift("bias", lambda: source.cast("bias"))
    return emit_linear(emitter, hidden, down, bias)


def _kept_hidden(
    emitter: Emitter, source: FFNTensors, x: Node, *, folded: bool
) -> tuple[Node, Node | None]:
    """Return the kept neurons' values [..., k], and M x + b if the map is stacked below them."""
    k, details = source.kept, source.site.details
    name = "rows" if folded else "kept_rows"
    rows = source.matrix(name, lambda: _stacked(source, folded=folded))
    bias = source.lift(f"{name}_bias", lambda: _stacked_bias(source, folded=folded))
    made = emit_linear(emitter, x, rows, bias)

    def part(start: int, stop: int | None) -> Node:
        return emitter.call(operator.getitem, made, (Ellipsis, slice(start, stop)))

    hidden = emitter.activation(details["activation"], part(0, k))
    first = k
    if details["gated"]:
        hidden = emitter.call(torch.mul, hidden, part(k, 2 * k))
        first = 2 * k
    return hidden, part(first, None) if folded else None


def _stacked(source: FFNTensors, *, folded: bool) -> list[Tensor | Int8Matrix]:
    """Return [W1_K | W_up_K | M] as rows [n, d], one part a list item."""
    parts = [source.kept_rows(weight) for weight, _ in _projections(source.dense)]
    return [*parts, source.site.tensors["weight"]] if folded else parts


def _stacked_bias(source: FFNTensors, *, folded: bool) -> Tensor:
    """Return the biases [n] of these rows."""
    parts = []
    for weight, bias in _projections(source.dense):
        kept = source.site.tensors["kept"].to(weight.device)
        zeros = torch.zeros(len(kept), dtype=source.like.dtype, device=source.like.device)
        parts.append(zeros if bias is None else bias.index_select(0, kept))
    return torch.cat([*parts, source.cast("bias")] if folded else parts)


def _projections(weights: FFNWeights) -> list[tuple[Tensor, Tensor | None]]:
    """Return weight and bias of each projection that the neurons read x by."""
    first = (weights.w1, weights.b1)
    return [first] if weights.w_up is None else [first, (weights.w_up, weights.b_up)]


def _guarded(emitter: Emitter, source: FFNTensors, x: Node) -> Node:
    """Add the guarded op, its counters, and the kept neurons."""
    like, site = source.like, source.site
    if source.quantized:
        raise UnsupportedDtypeError(
            f"{site.name} is folded with a guard, which reads rows of the model's own weights and "
            'cannot read quantized ones; calibrate with guard="off", or leave this FFN out of '
            "quantize_ by its filter_fn"
        )
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


def _kept_columns(source: FFNTensors) -> Tensor:
    return source.dense.select(source.site.tensors["kept"]).w2.contiguous()


def _argument(source: FFNTensors, name: str, value: object) -> object:
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
