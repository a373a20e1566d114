"""Which value states are worth having: held-out NMSE of attention maps that read them.

    python benchmarks/value_states.py --text calibration.jsonl --layers 0,2,4,5,7

For each layer and each set of states one table cell: the error of the best ridge on held-out blocks
of 128 tokens. ``tap j`` is v_{t−j}, ``mean`` the mean of v_1 … v_t, ``decay λ`` the average
e_t = λ e_{t−1} + (1 − λ) v_t, ``first`` the value of the first token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from decoder_texts import arguments, load
from rich.console import Console
from rich.table import Table
from ridge_maps import Products, Rows
from torch import Tensor, nn
from torch.fx import GraphModule

from nbl_compiler.batches import cheap_arguments, model_inputs
from nbl_compiler.passes.match_attention import match
from nbl_compiler.passes.private_copy import private_copy

SETS: dict[str, tuple[str, ...]] = {
    "none": (),
    "tap 1": ("tap 1",),
    "taps 1–4": ("tap 1", "tap 2", "tap 3", "tap 4"),
    "taps 1, 2, 4, 8": ("tap 1", "tap 2", "tap 4", "tap 8"),
    "first": ("first",),
    "mean": ("mean",),
    "decay 0.5": ("decay 0.5",),
    "decay 0.8": ("decay 0.8",),
    "decay 0.95": ("decay 0.95",),
    "tap 1, mean": ("tap 1", "mean"),
    "taps 1–4, mean": ("tap 1", "tap 2", "tap 3", "tap 4", "mean"),
    "tap 1, decay 0.8": ("tap 1", "decay 0.8"),
    "tap 1, decay 0.9": ("tap 1", "decay 0.9"),
    "decays 0.5, 0.8, 0.95": ("decay 0.5", "decay 0.8", "decay 0.95"),
    "tap 1, decay 0.8, mean": ("tap 1", "decay 0.8", "mean"),
    "tap 1, decay 0.9, mean": ("tap 1", "decay 0.9", "mean"),
}
# The chosen set once more, its maps of the states limited to a rank (reduced-rank regression).
CHOSEN, RANKS = "tap 1, decay 0.8, mean", (16, 64, 256)


def main() -> None:
    """Print one table: sets of states down, layers across."""
    parser = arguments(__doc__, tokens=32_768)
    parser.add_argument("--layers", default="0,2,4,5,7,10,13,15,16,17")
    args = parser.parse_args()
    subject = load(args)
    layers = [int(item) for item in args.layers.split(",")]
    seen = observed(subject.model, subject.batches(), layers)
    columns = [errors(*seen[layer]) for layer in layers]
    title = f"{args.model}: held-out NMSE of attention maps by what they read of the values"
    table = Table("states", "vectors", title=title, title_justify="left")
    for layer in layers:
        table.add_column(f"layer {layer}", justify="right")
    for name, parts in SETS.items():
        table.add_row(name, str(len(parts)), *(f"{column[name]:.3f}" for column in columns))
    for name in map(_ranked, RANKS):
        vectors = str(len(SETS[CHOSEN]))
        table.add_row(name, vectors, *(f"{column[name]:.3f}" for column in columns))
    Console().print(table)


Seen = tuple[list[Tensor], list[Tensor], list[Tensor]]


def observed(model: nn.Module, batches: Any, layers: Sequence[int]) -> dict[int, Seen]:
    """Return layer → batches of (x [B, T, d], v [B, T, n], y [B, T, d_out])."""
    seen: dict[int, Seen] = {layer: ([], [], []) for layer in layers}

    def record(layer: int) -> Callable[[Tensor, Tensor, Tensor], None]:
        def add(x: Tensor, values: Tensor, y: Tensor) -> None:
            flat = values.transpose(1, 2).flatten(2)
            for kept, rows in zip(seen[layer], (x, flat, y), strict=True):
                kept.append(rows.detach().clone())

        return add

    def backend(graph_module: GraphModule, _: Any) -> Callable[..., Any]:
        graph_module = private_copy(graph_module)
        for layer, found in enumerate(match(graph_module).found):
            if layer in seen and not isinstance(found.value_path, str):
                with graph_module.graph.inserting_after(found.output):
                    operands = (found.hidden, found.value_path.new, found.output)
                    graph_module.graph.call_function(record(layer), operands)
        graph_module.recompile()
        return graph_module.forward

    compiled = torch.compile(lambda **given: model(**given), backend=backend)
    with torch.no_grad():
        for batch in batches:
            given = model_inputs(model, batch, torch.device("cpu"))
            compiled(**{**cheap_arguments(model), **given})
    return seen


def state(name: str, values: Tensor) -> Tensor:
    """Return one state [B, T, n] of values [B, T, n]."""
    kind, _, number = name.partition(" ")
    if kind == "first":
        return values[:, :1].expand_as(values)
    if kind == "mean":
        count = torch.arange(1, values.shape[1] + 1)[:, None]
        return (values.double().cumsum(1) / count).float()
    if kind == "tap":
        lag = int(number)
        return torch.cat([torch.zeros_like(values[:, :lag]), values[:, :-lag]], 1)
    decay, result = float(number), torch.empty_like(values)
    result[:, 0] = values[:, 0]
    for token in range(1, values.shape[1]):
        result[:, token] = decay * result[:, token - 1] + (1 - decay) * values[:, token]
    return result


def errors(inputs: list[Tensor], values: list[Tensor], outputs: list[Tensor]) -> dict[str, float]:
    """Return set of states → held-out NMSE of the map that reads x and them."""
    names = sorted({part for parts in SETS.values() for part in parts})
    rows = [
        torch.cat([x, *(state(name, v) for name in names)], -1).flatten(0, 1)
        for x, v in zip(inputs, values, strict=True)
    ]
    seen = Rows(torch.cat(rows), torch.cat([y.flatten(0, 1) for y in outputs]))
    width, each = inputs[0].shape[-1], values[0].shape[-1]
    result = {}
    for name, parts in SETS.items():
        starts = [width + names.index(part) * each for part in parts]
        columns = [*range(width), *(c for start in starts for c in range(start, start + each))]
        weights = seen.maps(columns)
        result[name] = min(seen.error(columns, weight) for weight in weights)
        if name == CHOSEN:
            for rank in RANKS:
                limited = (_limited(seen.fit, columns, w, width, rank) for w in weights)
                result[_ranked(rank)] = min(seen.error(columns, w) for w in limited)
    return result


def _ranked(rank: int) -> str:
    return f"{CHOSEN}, rank {rank}"


def _limited(fit: Products, columns: list[int], weight: Tensor, width: int, rank: int) -> Tensor:
    """Return the map with that of the states, behind the first ``width`` rows, of lower rank.

    What the map of x can make up for counts as no loss: the states are taken as far as x does not
    tell them.
    """
    index = torch.tensor(columns)
    gram = fit[0][index][:, index]
    told = torch.linalg.lstsq(gram[:width, :width], gram[:width, width:]).solution
    own = gram[width:, width:] - gram[width:, :width] @ told
    values, vectors = torch.linalg.eigh((own + own.T) / 2)
    root = vectors * values.clamp_min(0).sqrt()
    left, size, right = torch.linalg.svd(root.T @ weight[width:], full_matrices=False)
    wanted = left[:, :rank] * size[:rank] @ right[:rank]
    states = torch.linalg.lstsq(root.T, wanted).solution
    x = weight[:width] + told @ (weight[width:] - states)
    return torch.cat([x, states])


if __name__ == "__main__":
    main()
