"""``rank_by="loss"``: the order in which sites are best replaced, found in the model itself.

What an error in one layer costs depends on the rest of the model, which no score of the layer
alone (NMSE, CCA) knows; and two maps that are harmless alone may not be so together. So sites are
tried: first each alone, then greedily, each time adding the one of the next few that disturbs the
model's predictions least::

    disturbance = mean over positions of  Σ_v p(v) (log p(v) − log q(v)),   p dense, q with maps

The mean is taken on three kinds of text, and the worst of them counts. Text as it is; text that
repeats itself; and recoded text, in which each row's most frequent tokens are others. Some layers
look for what followed an earlier occurrence of a token (induction heads, arXiv 2209.11895), or pick
up the conventions of a text (spaces in front of commas, say) from what came before; no map of one
token can do either. Ordinary text of a few hundred tokens hardly needs them, long contexts and
texts of another kind than the calibration's do.

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
from nbl_compiler.trial_text import Part, can_be_edited, few_rows, recoded, repeated

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
        batches: Model inputs that the maps were not fitted on.
        options: Say how many sites are wanted (further ones keep the order they have alone), and
            what the maps read.

    Raises:
        ConfigError: if the model returns no logits.
    """
    maps = {c.name: (c.fit.weight, c.fit.bias) for c in candidates}
    trial = _Trial(model, maps, list(batches), residual=options.input == "residual")
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
        batches: Sequence[Mapping[str, Any]],
        *,
        residual: bool,
    ) -> None:
        self._maps, self._residual = dict(maps), residual
        self._active: frozenset[str] = frozenset()
        natural = few_rows(model, batches)
        plain = [part for part in natural if can_be_edited(part)]
        edited = ([*map(repeated, plain)], [*map(recoded, plain)]) if plain else ()
        self._parts = (natural, *edited)
        # A function of its own: Dynamo must not keep these graphs with the model's forward.
        self._forward = torch.compile(lambda **inputs: model(**inputs), backend=self._backend)
        self._dense: dict[int, Tensor] = {}

    def __call__(self, active: frozenset[str]) -> float:
        """Return the mean KL divergence on the worst kind of text, in nats a token."""
        if not self._dense:
            self._active = frozenset()
            self._dense = {
                id(part): self._log_probabilities(part) for kind in self._parts for part in kind
            }
        self._active = active
        return max(map(self._divergence, self._parts))

    def _divergence(self, parts: Sequence[Part]) -> float:
        total, count = 0.0, 0
        for part in parts:
            dense, other = self._dense[id(part)], self._log_probabilities(part)
            # Σ p (log p − log q), without further tensors of the vocabulary's size.
            divergence = F.kl_div(other, dense, reduction="sum", log_target=True)
            total, count = total + float(divergence), count + dense.shape[0]
        return total / max(count, 1)

    def release(self) -> None:
        """Let go of maps and predictions: Dynamo's cache may outlive this object's use."""
        self._maps.clear()
        self._dense = {}

    def _log_probabilities(self, part: Part) -> Tensor:
        logits = getattr(self._forward(**part.inputs), "logits", None)
        if logits is None:
            raise ConfigError(
                'rank_by="loss" needs a model that predicts tokens (this one returned no logits); '
                'use rank_by="nmse"'
            )
        flat = logits.flatten(0, -2)
        return F.log_softmax(flat[part.keep(flat.shape[0])].float(), -1)

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
