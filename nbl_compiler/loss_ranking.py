"""``rank_by="loss"``: the order in which sites are best replaced, found in the model itself.

What an error in one layer costs depends on the rest of the model, which no score of the layer
alone (NMSE, CCA) knows; and two maps that are harmless alone may not be so together. So sites are
tried: first each alone, then greedily, each time adding the one of the next few that disturbs the
model's predictions least::

    disturbance = mean over positions of  Σ_v p(v) (log p(v) − log q(v)),   p dense, q with maps

One traced graph serves all trials: at every site a switch passes the dense output on, or the map's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from tqdm.auto import tqdm

from nbl_compiler.config import Attention
from nbl_compiler.errors import ConfigError
from nbl_compiler.passes.canonicalize import Canonicalize
from nbl_compiler.passes.match_attention import match
from nbl_compiler.passes.private_copy import private_copy
from nbl_compiler.passes.sites import AttentionMatch
from nbl_compiler.select import Candidate, wanted_count

# Tokens a trial, and how many of their positions are compared: the LM head is the dearest part.
TRIAL_TOKENS = 2048
TRIAL_POSITIONS = 1024
# How many of the sites that are best alone compete for the next place.
COMPETITORS = 4


def rank_by_loss(
    model: nn.Module,
    candidates: Sequence[Candidate],
    batches: Iterable[Mapping[str, Any]],
    options: Attention,
    *,
    progress: bool,
) -> tuple[Candidate, ...]:
    """Return the candidates with their ``loss_rank``, and ``loss`` (alone, nats) in the details.

    Args:
        model: The dense model, a causal LM.
        candidates: Sites with their maps.
        batches: Model inputs that the maps were not fitted on; the first is used.
        options: Say how many sites are wanted (further ones keep the order they have alone), and
            what the maps read.

    Raises:
        ConfigError: if the model returns no logits.
    """
    maps = {c.name: (c.fit.weight, c.fit.bias) for c in candidates}
    trial = _Trial(model, maps, next(iter(batches)), residual=options.input == "residual")
    depth = min(wanted_count(len(maps), options), len(maps))
    total = len(maps) + max(depth - 1, 0) * COMPETITORS
    with torch.no_grad(), tqdm(total=total, desc="ranking", disable=not progress) as bar:

        def disturbance(active: Sequence[str]) -> float:
            bar.update(1)
            return trial(frozenset(active))

        alone = {name: disturbance([name]) for name in maps}
        order = greedy_order(alone, depth, disturbance)
    trial.release()
    places = {name: place for place, name in enumerate(order)}
    return tuple(
        replace(c, loss_rank=places[c.name], details={**c.details, "loss": alone[c.name]})
        for c in candidates
    )


def greedy_order(
    alone: Mapping[str, float], depth: int, disturbance: Callable[[Sequence[str]], float]
) -> list[str]:
    """Return all names, the first ``depth`` chosen greedily for what they do together.

    Args:
        alone: Name → disturbance of that one alone.
        depth: How many places to fill greedily.
        disturbance: Of several together.
    """
    left = sorted(alone, key=lambda name: alone[name])
    chosen = left[:1]
    left = left[1:]
    while left and len(chosen) < depth:
        together = {name: disturbance([*chosen, name]) for name in left[:COMPETITORS]}
        best = min(together, key=lambda name: together[name])
        chosen.append(best)
        left.remove(best)
    return chosen + left


class _Trial:
    """Runs the model with any set of sites replaced, and compares predictions with dense ones."""

    def __init__(
        self,
        model: nn.Module,
        maps: Mapping[str, tuple[Tensor, Tensor]],
        batch: Mapping[str, Any],
        *,
        residual: bool,
    ) -> None:
        self._maps, self._residual = dict(maps), residual
        self._active: frozenset[str] = frozenset()
        self._inputs, self._keep = _few_rows(model, batch)
        # A function of its own: Dynamo must not keep these graphs with the model's forward.
        self._forward = torch.compile(lambda **inputs: model(**inputs), backend=self._backend)
        self._dense: Tensor | None = None

    def __call__(self, active: frozenset[str]) -> float:
        """Return the mean KL divergence, in nats a token, that the active maps cause."""
        if self._dense is None:
            self._dense = self._log_probabilities(frozenset())
        other = self._log_probabilities(active)
        return float((self._dense.exp() * (self._dense - other)).sum(-1).mean())

    def release(self) -> None:
        """Let go of maps and predictions: Dynamo's cache may outlive this object's use."""
        self._maps.clear()
        self._dense = None

    def _log_probabilities(self, active: frozenset[str]) -> Tensor:
        self._active = active
        logits = getattr(self._forward(**self._inputs), "logits", None)
        if logits is None:
            raise ConfigError(
                'rank_by="loss" needs a model that predicts tokens (this one returned no logits); '
                'use rank_by="nmse"'
            )
        flat = logits.flatten(0, -2)
        return F.log_softmax(flat[self._keep(flat.shape[0])].float(), -1)

    def _backend(self, graph_module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        del inputs
        graph_module = private_copy(graph_module)
        Canonicalize()(graph_module)
        for found in match(graph_module).found:
            if found.site in self._maps:
                self._insert_switch(graph_module, found)
        graph_module.graph.lint()
        graph_module.recompile()
        return graph_module.forward

    def _insert_switch(self, graph_module: GraphModule, found: AttentionMatch) -> None:
        def switch(x: Tensor, y: Tensor) -> Tensor:
            if found.site not in self._active:
                return y
            weight, bias = (t.to(x.device, x.dtype) for t in self._maps[found.site])
            return F.linear(x, weight, bias).to(y.dtype)

        source = found.residual if self._residual else found.hidden
        users = list(found.output.users)
        with graph_module.graph.inserting_after(found.output):
            node = graph_module.graph.call_function(switch, (source, found.output))
        for user in users:
            user.replace_input_with(found.output, node)


def _few_rows(
    model: nn.Module, batch: Mapping[str, Any]
) -> tuple[dict[str, Any], Callable[[int], Tensor]]:
    """Return inputs of at most ``TRIAL_TOKENS`` tokens, and which flat positions to compare."""
    import inspect

    main = next(v for v in batch.values() if isinstance(v, Tensor))
    rows = max(min(TRIAL_TOKENS // max(main.shape[-1], 1), main.shape[0]), 1)
    inputs = {
        k: v[:rows] if isinstance(v, Tensor) and v.shape[:1] == main.shape[:1] else v
        for k, v in batch.items()
    }
    inputs["use_cache"] = False
    length, per_row = main.shape[-1], max(TRIAL_POSITIONS // rows, 1)
    positions = torch.arange(0, length, max(length // per_row, 1), device=main.device)
    mask = inputs.get("attention_mask")
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs["logits_to_keep"] = positions
        real = None if mask is None else mask[:, positions].flatten().bool()
        return (
            inputs,
            lambda count: torch.arange(count, device=main.device) if real is None else real,
        )
    every = max(rows * length // TRIAL_POSITIONS, 1)
    if mask is None:
        return inputs, lambda count: torch.arange(0, count, every, device=main.device)
    return inputs, lambda count: mask.flatten().nonzero().view(-1)[::every]
