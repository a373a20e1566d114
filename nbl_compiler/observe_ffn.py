"""Observers of FFN sites: one pass over the text, one stage a site.

y = down(h)      becomes      y = down(h);  observe(x, h, y)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from nbl_compiler.errors import UnsupportedDtypeError
from nbl_compiler.ffn.sites import FFNRows, FFNSite
from nbl_compiler.ffn.stages import Stage
from nbl_compiler.fingerprint import sketch
from nbl_compiler.passes.base import Rejected
from nbl_compiler.passes.ffn_sites import FFNMatch
from nbl_compiler.passes.ffn_weights import ffn_weights
from nbl_compiler.passes.graph_tools import shape_of
from nbl_compiler.passes.match_ffn import match_ffn
from nbl_compiler.passes.rewrite_sites import SUPPORTED_DTYPES
from nbl_compiler.rows import RowChooser
from nbl_compiler.several_processes import Failure
from nbl_compiler.tensor_parallel import is_spread, whole, whole_of_parts


class FFNObservers:
    """The observers of all FFN sites during one pass.

    Args:
        begin: Makes the stage of a site when it is first seen, or returns None to pass it over.
        failure: Receives the errors of a stage.
    """

    def __init__(self, begin: Callable[[FFNSite], Stage | None], failure: Failure) -> None:
        self._begin, self._failure = begin, failure
        self.sites: dict[str, FFNSite] = {}
        self.stages: dict[str, Stage] = {}
        self.rejected: dict[str, Rejected] = {}

    def insert(
        self, graph_module: GraphModule, values: Mapping[str, Any], chooser: RowChooser
    ) -> None:
        """Put an observer behind every FFN of a graph."""
        matches = match_ffn(graph_module)
        for refused in matches.rejected:
            self.rejected.setdefault(refused.site, refused)
        for found in matches.found:
            self._insert(graph_module, found, values, chooser)

    def _insert(
        self,
        graph_module: GraphModule,
        found: FFNMatch,
        values: Mapping[str, Any],
        chooser: RowChooser,
    ) -> None:
        name = found.site
        dtype = found.output.meta["example_value"].dtype
        if dtype not in SUPPORTED_DTYPES:
            raise UnsupportedDtypeError(f"{name} computes in {dtype}; load the model in float32")
        if name not in self.sites and not self._start(found, values):
            return
        stage = self.stages.get(name)
        if stage is None:
            return

        down = values.get(found.down.weight.name)
        device = self.sites[name].weights.w1.device

        def observe(x: Tensor, hidden: Tensor, y: Tensor) -> None:
            if chooser.recoded:
                return  # FFNs are fitted on text as it is
            if is_spread(down):
                hidden = whole_of_parts(hidden, -1, down)
            # Weights that are kept elsewhere come to the device for the forward pass alone.
            x, hidden, y = (t.detach().to(device) for t in (x, hidden, y))
            rows = FFNRows(*(t.reshape(-1, t.shape[-1]) for t in (x, hidden, y)))
            with self._failure:
                for held, chosen in enumerate(chooser.split(name, x)):
                    if chosen.numel():
                        stage.add(rows.select(chosen), held=bool(held))

        with graph_module.graph.inserting_after(found.output):
            graph_module.graph.call_function(
                observe, (found.hidden, found.down.source, found.output)
            )

    def _start(self, found: FFNMatch, values: Mapping[str, Any]) -> bool:
        def value_of(node: Node) -> Tensor | None:
            value = values.get(node.name)
            return None if value is None else whole(value)

        weights = ffn_weights(found, value_of)
        if weights is None:
            reason = "its weights are not parameters of the model"
            self.rejected.setdefault(
                found.site, Rejected(found.site, "ffn", found.anchor.name, reason)
            )
            return False
        read = [values[w.name] for w in found.weights if w.name in values]
        sketches = tuple(sketch(w) for w in read if isinstance(w, nn.Parameter))
        shapes = [shape_of(weight) or () for weight in found.weights]
        parameters = sum(prod(int(size) for size in shape) for shape in shapes)
        site = FFNSite(found.site, weights, sketches, parameters)
        self.sites[found.site] = site
        stage = self._begin(site)
        if stage is not None:
            self.stages[found.site] = stage
        return True
