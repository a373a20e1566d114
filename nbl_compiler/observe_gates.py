"""What attention does with its weights, observed at every site that can read mixed values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from nbl_compiler.errors import CalibrationError, ConfigError
from nbl_compiler.looking import Looking
from nbl_compiler.lowering.mixed_values import bucket_sizes
from nbl_compiler.passes.attention_weights import has_plain_scale, insert_view_of_weights
from nbl_compiler.passes.canonicalize import Canonicalize
from nbl_compiler.passes.match_attention import match
from nbl_compiler.passes.private_copy import private_copy
from nbl_compiler.passes.sites import AttentionMatch
from nbl_compiler.rows import RowChooser
from nbl_compiler.solvers.gates import WeightSamples, joined
from nbl_compiler.tensor_parallel import is_spread
from nbl_compiler.user_errors import reported_by_dynamo

Samples = tuple[WeightSamples, WeightSamples]
"""Tokens to fit, and held-out ones."""


class GateObserver(Looking[dict[str, Samples]]):
    """Keeps hidden states and attention's weights of all tokens; ``backend`` is a Dynamo backend.

    Args:
        holdout: Share of the tokens to hold out.
        seed: Of that choice.
    """

    def __init__(self, holdout: float, seed: int) -> None:
        super().__init__(RowChooser(holdout, seed))
        self._seen: dict[str, tuple[list[WeightSamples], list[WeightSamples]]] = {}

    def backend(
        self, graph_module: GraphModule, example_inputs: Sequence[Any]
    ) -> Callable[..., Any]:
        """Look at the weights of every matched site and run the graph as it is."""
        nodes = graph_module.graph.find_nodes(op="placeholder")
        values = dict(zip((node.name for node in nodes), example_inputs, strict=True))
        graph_module = private_copy(graph_module)
        Canonicalize()(graph_module)
        with reported_by_dynamo():
            for found in match(graph_module).found:
                refuse_spread(found, values)
                if not isinstance(found.value_path, str) and has_plain_scale(found):
                    insert_view_of_weights(graph_module, found, self._see(found.site))
        graph_module.graph.lint()
        graph_module.recompile()
        return graph_module.forward

    def _see(self, site: str) -> Callable[[Tensor, Tensor, Tensor], None]:
        def see(x: Tensor, masses: Tensor, count: Tensor) -> None:
            sizes = bucket_sizes(count).expand(*masses.shape[:2], -1)
            parts = (x.reshape(-1, x.shape[-1]), masses.flatten(0, 1), sizes.flatten(0, 1))
            kept = self._seen.setdefault(site, ([], []))
            for chosen, samples in zip(self._rows.split(site, x), kept, strict=True):
                seen, masses, sizes = (part[chosen].cpu() for part in parts)
                # Rounding to 8 bits is nothing beside what x does not say of the weights.
                own = WeightSamples(seen.bfloat16(), masses.float(), sizes.float())
                if not (own.x.isfinite().all() and own.masses.isfinite().all()):
                    raise CalibrationError(f"{site}: activations hold NaN or infinity")
                samples.append(own)

        return see

    def finish(self) -> dict[str, Samples]:
        """Return site name → what was seen."""
        made: dict[str, Samples] = {}
        for site in list(self._seen):  # one at a time: joined ones are copies
            train, held = self._seen.pop(site)
            made[site] = joined(train), joined(held)
        return made

    def release(self) -> None:
        """Let go of everything: whatever else holds this observer must not hold it."""
        self._rows.forget()
        self._seen = {}


def refuse_spread(found: AttentionMatch, values: Mapping[str, Any]) -> None:
    """Raise if a site's weights are spread over processes: each has the values of some heads.

    Raises:
        ConfigError: for a tensor-parallel model.
    """
    read = (values[w.name] for w in found.weights if w.name in values)
    if any(isinstance(w, Tensor) and is_spread(w) for w in read):
        raise ConfigError(
            f"{found.site}: a tensor-parallel model has the values of some heads in each "
            "process, and maps that read values need all; calibrate without taps and mixed "
            "values, or load the model with a device_map instead"
        )
