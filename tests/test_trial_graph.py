"""Trials compute only what they need, and get the same."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from helpers.tiny import text, tiny
from models.architectures import HIDDEN
from torch import Tensor, nn

import nbl_compiler as nbl
from nbl_compiler.loss_trial import Trial
from nbl_compiler.passes.switches import StandIn, linear_map
from nbl_compiler.trial_graph import Interpreter, TrialGraph
from nbl_compiler.trial_text import Part

LAYERS = 3


class Broken(nn.Module):
    """Two models, one behind the other, with a break between their graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = tiny(layers=LAYERS), tiny(layers=1)

    def forward(self, input_ids: Tensor) -> Any:
        hidden = self.first(input_ids, use_cache=False, output_hidden_states=True).hidden_states
        torch._dynamo.graph_break()
        return self.second(inputs_embeds=hidden[-1], use_cache=False)


class Repeated(nn.Module):
    """One graph that runs twice for a text."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny(layers=LAYERS)

    def forward(self, input_ids: Tensor) -> Any:
        hidden = self.model.get_input_embeddings()(input_ids)
        for _ in range(2):
            torch._dynamo.graph_break()
            hidden = self.model.model(inputs_embeds=hidden, use_cache=False).last_hidden_state
        return {"logits": hidden}


def part(seed: int) -> Part:
    return Part({"input_ids": text(2, 24, seed)}, lambda count: torch.arange(count))


def stand_ins(names: list[str]) -> dict[str, StandIn]:
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name in names:
        weight = torch.randn(HIDDEN, HIDDEN, generator=generator) / HIDDEN
        made[name] = linear_map(weight, torch.randn(HIDDEN, generator=generator) / HIDDEN)
    return made


def losses(model: nn.Module) -> dict[tuple[str, ...], float]:
    """Return what one, two or all sites cost, on two kinds of text."""
    names = list(dict.fromkeys(nbl.explain(model, text(2, 24)).matched))
    maps = stand_ins(names)
    trial = Trial(model, names, [[part(0)], [part(1), part(2)]], residual=False)
    sets = [*combinations(names, 1), *combinations(names, 2), tuple(names)]
    torch._dynamo.reset()
    with torch.no_grad():
        made = {some: trial({name: maps[name] for name in some}) for some in sets}
        assert made == {some: trial({name: maps[name] for name in some}) for some in sets}
    return made


@pytest.mark.parametrize("make", [lambda: tiny(layers=LAYERS), Broken, Repeated])
def test_same_as_running_everything(make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: in one graph, with the graph broken, with a graph that runs twice."""
    found = losses(make())

    def whole(self: TrialGraph, args: Any, text: Any, active: Any) -> Any:
        return Interpreter(self._graph_module).run(*args)

    monkeypatch.setattr(TrialGraph, "__call__", whole)
    assert found == losses(make())
    assert len(found) > 20  # 6 or more sites, alone and in pairs
    assert max(found.values()) > 0.1


def test_beyond_a_limit_the_worst_kind_of_before_is_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny(layers=1)
    maps = stand_ins(list(nbl.explain(model, text(2, 24)).matched))
    kinds = [[part(0)], [part(1), part(2)], [part(3)]]
    torch._dynamo.reset()
    with torch.no_grad():
        trial = Trial(model, maps, kinds, residual=False)
        each = [Trial(model, maps, [kind], residual=False)(maps) for kind in kinds]
        assert trial(maps) == max(each)
        every = {**dict(enumerate(each)), 3: 0.0}  # of the last kind there is no text
        ran: list[int] = []
        said = Trial._said
        monkeypatch.setattr(Trial, "_said", lambda self, one: ran.append(1) or said(self, one))
        worst = max(range(len(kinds)), key=each.__getitem__)
        assert trial.each_kind(maps, limit=min(each) / 2) == {worst: each[worst]}
        assert len(ran) == len(kinds[worst])
        ran.clear()
        assert trial.each_kind(maps, limit=max(each)) == every
        assert len(ran) == 4
        # What counts is how much a kind has risen.
        assert trial.each_kind(maps, before=every, limit=0.0) == every
        assert len(trial.each_kind(maps, before=every, limit=-1e-9)) == 1


@pytest.mark.parametrize("family", ["llama", "gemma3"])  # the latter combines masks
def test_only_what_is_needed_runs(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last site: its own layer's end and the head. The first site: all but its inside."""
    model = tiny(family, layers=LAYERS)
    names = list(dict.fromkeys(nbl.explain(model, text(2, 24)).matched))
    maps = stand_ins(names)
    trial = Trial(model, names, [[part(0)]], residual=False)
    torch._dynamo.reset()
    ran: list[int] = []
    run_node = Interpreter.run_node

    def counting(self: Interpreter, node: Any) -> Any:
        ran[-1] += node.op == "call_function"
        return run_node(self, node)

    monkeypatch.setattr(Interpreter, "run_node", counting)

    def calls(*some: str) -> int:
        ran.append(0)
        trial({name: maps[name] for name in some})
        return ran[-1]

    with torch.no_grad():
        everything = calls()  # the dense run
        attention = [name for name in names if name.endswith("self_attn")]
        mlp = [name for name in names if name.endswith("mlp")]
        first, last, all_gone = calls(attention[0]), calls(mlp[-1]), calls(*names)
    assert last < 0.15 * everything
    assert first < everything
    assert all_gone < 0.5 * everything


def test_a_graph_that_writes_is_run_whole() -> None:
    class Writing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            y.add_(1)
            return y.relu()

    graph = torch.fx.symbolic_trace(Writing())
    runs = TrialGraph(graph, {})
    assert torch.equal(runs([torch.ones(2)], 0, ()), torch.full((2,), 3.0))
    assert torch.equal(runs([torch.ones(2)], 0, ("elsewhere",)), torch.full((2,), 3.0))
