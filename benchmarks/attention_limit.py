"""How much of an attention layer a map gives that does not compare tokens.

    python benchmarks/attention_limit.py --text calibration.jsonl --layers 2,6,8,13,16

Held-out NMSE of the best ridge map of each layer, by what it reads besides the layer's input x:

``states``  one earlier value, the decaying and the plain mean of values: what a plan keeps.
``blind``   for each head, its real attention over real keys, with one query for all tokens: the
            head's mean query. It weighs all that came before as the layer does on average, by
            content and by distance, and does not look at the token that asks. It needs all keys and
            values, so it costs what attention costs.

It is one pattern that does not look at the token, and a strong one; not proved to be the best. The
attention modules must have ``q_norm`` or ``q_proj``, and ``o_proj``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from decoder_texts import arguments, load
from rich.console import Console
from rich.table import Table
from ridge_maps import Rows
from torch import Tensor, nn
from value_states import CHOSEN, SETS, state

from nbl_compiler.batches import cheap_arguments, model_inputs


class Watched:
    """One attention module: what it reads and gives, and what it gives to its mean query.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._blind = False
        self._sum, self._count = torch.zeros(()), 0
        self.inputs: list[Tensor] = []
        self.values: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.blind: list[Tensor] = []
        query = getattr(module, "q_norm", None) or module.q_proj
        query.register_forward_hook(self._query)
        module.o_proj.register_forward_pre_hook(self._mixed)
        module.v_proj.register_forward_hook(self._value)
        module.register_forward_hook(self._again, with_kwargs=True)
        self.collecting = False

    def _query(self, _: nn.Module, __: Any, query: Tensor) -> Tensor | None:
        if self._blind:  # [B, H, T, D] behind a norm, [B, T, H D] behind the projection
            return (self._sum / self._count).expand_as(query)
        if not self.collecting:
            tokens = 2 if query.ndim == 4 else 1
            self._sum = self._sum + query.sum((0, tokens), keepdim=True)
            self._count += query.shape[0] * query.shape[tokens]
        return None

    def _value(self, _: nn.Module, __: Any, value: Tensor) -> None:
        if self.collecting and not self._blind:
            self.values.append(value)

    def _mixed(self, _: nn.Module, args: tuple[Tensor]) -> None:
        if self._blind:
            self.blind.append(args[0])

    def _again(self, module: nn.Module, args: Any, given: dict[str, Any], output: Any) -> None:
        if self._blind or not self.collecting:
            return
        self.inputs.append(args[0] if args else given["hidden_states"])
        self.outputs.append(output[0])
        self._blind = True
        try:
            module(*args, **given)
        finally:
            self._blind = False


def errors(seen: Watched) -> list[float]:
    """Return the held-out NMSE for x; x and states; x and blind attention; and all of them."""
    names = SETS[CHOSEN]
    rows = [
        torch.cat([x, *(state(name, v) for name in names), blind], -1).flatten(0, 1)
        for x, v, blind in zip(seen.inputs, seen.values, seen.blind, strict=True)
    ]
    fitted = Rows(torch.cat(rows), torch.cat([y.flatten(0, 1) for y in seen.outputs]))
    width = seen.inputs[0].shape[-1]
    states = width + len(names) * seen.values[0].shape[-1]
    every = rows[0].shape[-1]
    parts: list[Sequence[int]] = [
        range(width), range(states), [*range(width), *range(states, every)], range(every)
    ]  # fmt: skip
    return [fitted.least(list(columns)) for columns in parts]


def main() -> None:
    """Print one table: layers down."""
    parser = arguments(__doc__, tokens=28_672)
    parser.add_argument("--layers", default="2,6,8,13,16")
    args = parser.parse_args()
    subject = load(args)
    model, batches = subject.model, subject.batches()
    layers = [int(item) for item in args.layers.split(",")]
    watched = {layer: Watched(model.model.layers[layer].self_attn) for layer in layers}
    run = _runner(model, batches)
    run()
    for one in watched.values():
        one.collecting = True
    run()
    table = Table("layer", "x", "x, states", "x, blind attention", "all", title=args.model)
    for layer, one in watched.items():
        table.add_row(str(layer), *(f"{error:.3f}" for error in errors(one)))
    Console().print(table)


def _runner(model: nn.Module, batches: Sequence[Any]) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            for batch in batches:
                given = model_inputs(model, batch, torch.device("cpu"))
                model(**{**cheap_arguments(model), **given})

    return run


if __name__ == "__main__":
    main()
