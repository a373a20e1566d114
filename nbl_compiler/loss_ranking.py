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

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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
# Fewer tokens make the order a matter of luck.
TRIAL_TOKENS = 2048
TRIAL_POSITIONS = 512
# Rows of fewer tokens say nothing when they are repeated or recoded.
MIN_EDITED = 16
# How many tokens of a row's vocabulary are replaced: commas, full stops, articles.
RECODED_TOKENS = 8
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
        natural = _few_rows(model, batches)
        plain = [part for part in natural if _can_be_edited(part)]
        edited = ([*map(_repeated, plain)], [*map(_recoded, plain)]) if plain else ()
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

    def _divergence(self, parts: Sequence[_Part]) -> float:
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

    def _log_probabilities(self, part: _Part) -> Tensor:
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


@dataclass(frozen=True)
class _Part:
    """Some rows of one batch.

    Args:
        inputs: The model's inputs.
        keep: Number of flat positions of the logits → indices (or mask) of those to compare.
    """

    inputs: dict[str, Any]
    keep: Callable[[int], Tensor]


def _can_be_edited(part: _Part) -> bool:
    """Tell whether the part holds rows of token ids without padding, of more than a few tokens."""
    ids, mask = part.inputs.get("input_ids"), part.inputs.get("attention_mask")
    whole = not isinstance(mask, Tensor) or bool(mask.all())
    return isinstance(ids, Tensor) and ids.ndim == 2 and ids.shape[1] >= MIN_EDITED and whole


def _repeated(part: _Part) -> _Part:
    """Return half of the part's rows, the second half of each a repetition of the first.

    The opening token is not repeated; only what follows the repeated tokens is compared.
    """
    ids = part.inputs["input_ids"]
    length = ids.shape[1]
    half = -(-length // 2)
    again = torch.cat([ids[:, : half + 1], ids[:, 1 : length - half]], 1)
    return _edited(part, again, first=half + 1)


def _recoded(part: _Part) -> _Part:
    """Return half of the part's rows with the most frequent tokens of each replaced by others.

    The opening token stays. The others come from the part, and are the same on every run.
    """
    ids = part.inputs["input_ids"].cpu()
    generator = torch.Generator().manual_seed(0)
    known = ids[:, 1:].unique()
    recoded = ids.clone()
    for row, new in zip(ids[:, 1:], recoded[:, 1:], strict=True):
        tokens, counts = row.unique(return_counts=True)
        frequent = tokens[counts.argsort(descending=True, stable=True)[:RECODED_TOKENS]]
        others = known[torch.randperm(known.numel(), generator=generator)]
        for old, other in zip(frequent, others, strict=False):
            new[row == old] = other
    return _edited(part, recoded.to(part.inputs["input_ids"].device), first=0)


def _edited(part: _Part, ids: Tensor, first: int) -> _Part:
    """Return the first half of the rows with other ids, compared from position ``first`` on."""
    rows, length = -(-ids.shape[0] // 2), ids.shape[1]
    inputs = {
        name: value[:rows] if isinstance(value, Tensor) and name != "logits_to_keep" else value
        for name, value in part.inputs.items()
    }
    inputs["input_ids"] = ids[:rows]
    kept = inputs.get("logits_to_keep")
    if isinstance(kept, Tensor):
        inputs["logits_to_keep"] = kept[kept >= first]
        return _Part(inputs, lambda count: torch.arange(count, device=ids.device))
    chosen = part.keep(ids.numel())
    chosen = chosen[(chosen < rows * length) & (chosen % length >= first)]
    return _Part(inputs, lambda _: chosen)


def _few_rows(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> list[_Part]:
    """Return inputs of about ``TRIAL_TOKENS`` tokens, and which positions to compare."""
    left = TRIAL_TOKENS
    parts: list[_Part] = []
    sizes = [_main(batch).shape for batch in batches]
    total = min(sum(shape.numel() for shape in sizes), TRIAL_TOKENS)
    for batch, shape in zip(batches, sizes, strict=True):
        rows = min(max(left // max(shape[-1], 1), 0 if parts else 1), shape[0])
        if rows:
            share = rows * shape[-1] / max(total, 1)
            parts.append(_part(model, batch, rows, max(int(TRIAL_POSITIONS * share), 1)))
            left -= rows * shape[-1]
    return parts


def _main(batch: Mapping[str, Any]) -> Tensor:
    return next(v for v in batch.values() if isinstance(v, Tensor))


def _part(model: nn.Module, batch: Mapping[str, Any], rows: int, positions: int) -> _Part:
    main = _main(batch)
    inputs = {
        k: v[:rows] if isinstance(v, Tensor) and v.shape[:1] == main.shape[:1] else v
        for k, v in batch.items()
    }
    inputs["use_cache"] = False
    length, device = main.shape[-1], main.device
    mask = inputs.get("attention_mask")
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        kept = torch.arange(0, length, max(rows * length // positions, 1), device=device)
        inputs["logits_to_keep"] = kept
        real = None if mask is None else mask[:, kept].flatten().bool()
        return _Part(
            inputs, lambda count: torch.arange(count, device=device) if real is None else real
        )
    every = max(rows * length // positions, 1)
    if mask is None:
        return _Part(inputs, lambda count: torch.arange(0, count, every, device=device))
    return _Part(inputs, lambda count: mask.flatten().nonzero().view(-1)[::every])
