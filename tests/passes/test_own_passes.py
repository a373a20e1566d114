"""A user's own passes in the pipeline."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.plans import random_plan
from helpers.tiny import compiled, output, text, tiny
from models.architectures import BY_NAME, HIDDEN
from torch import nn
from torch.fx import GraphModule

import nbl_compiler as nbl
from nbl_compiler.errors import ConfigError
from nbl_compiler.passes.pipeline import build_pipeline


@dataclass(frozen=True)
class Scale:
    """Doubles what every SiLU returns: easy to see from outside."""

    name: str = "scale"
    before: str | None = "clean_up"
    seen: list[int] = field(default_factory=list)

    def __call__(self, graph_module: GraphModule) -> nbl.PassReport:
        done = []
        for node in list(graph_module.graph.nodes):
            if node.op == "call_function" and node.target in (F.silu, torch._C._nn.silu):
                users = list(node.users)
                with graph_module.graph.inserting_after(node):
                    scaled = graph_module.graph.call_function(torch.mul, (node, 2.0))
                scaled.meta.update(node.meta)
                for user in users:
                    user.replace_input_with(node, scaled)
                done.append(node.name)
        self.seen.append(len(done))
        return nbl.PassReport(rewritten=tuple(done), notes=("doubled",))


@dataclass(frozen=True)
class Quiet:
    """Does nothing, and says so in its own way."""

    name: str = "quiet"
    report: Any = None

    def __call__(self, graph_module: GraphModule) -> Any:
        return self.report


class ForgetsAnOutput:
    """Changes what Dynamo relies on."""

    name = "forgets"

    def __call__(self, graph_module: GraphModule) -> nbl.PassReport:
        (node,) = graph_module.graph.find_nodes(op="output")
        node.args = ((*node.args[0], node.args[0][0]),)
        return nbl.PassReport()


def names(*passes: nbl.Pass, lowering: str = "eager") -> list[str]:
    return [step.name for step in build_pipeline(nbl.Plan(), lowering, passes)]


def double_activations(model: nn.Module) -> None:
    """Do in the model what ``Scale`` does in its graphs."""
    for layer in model.model.layers:
        layer.mlp.act_fn.forward = lambda x: 2 * F.silu(x)


def test_a_pass_runs_without_a_plan() -> None:
    model, step = tiny(), Scale()
    dense = output(model, text())
    fast = compiled(model, plan=nbl.Plan(), passes=[step])
    doubled = output(fast, text())
    assert not torch.allclose(doubled, dense, atol=1e-5)
    assert step.seen == [2]  # one SiLU a layer
    double_activations(model)
    torch.testing.assert_close(doubled, output(model, text()))


def test_a_pass_joins_the_rewrites_of_a_plan(tmp_path: Path) -> None:
    model = tiny()
    plan = random_plan(model, BY_NAME["llama"].site_names(2), [1], HIDDEN)
    reports: list[Any] = []
    fast = compiled(model, plan=plan, passes=[Scale()], dump_dir=tmp_path, report=reports.append)
    both = output(fast, text())
    assert not torch.allclose(both, output(compiled(model, plan=plan), text()), atol=1e-5)
    double_activations(model)
    torch.testing.assert_close(both, output(compiled(model, plan=plan), text()))
    runs = [run.name for run in reports[0].runs]
    assert runs.index("fold_ffn") < runs.index("scale") < runs.index("clean_up")
    after = next(tmp_path.glob("graph_000/*.scale.after.py")).read_text()
    assert "# note: doubled" in after
    assert reports[0].runs[runs.index("scale")].seconds > 0


def test_places() -> None:
    standard = names()
    assert names(Scale(before="canonicalize"))[0] == "scale"
    assert names(Scale(before=None))[-1] == "scale"
    assert names(Quiet())[:-1] == [n for n in standard if n != "clean_up"] + ["quiet"]
    assert names(Scale(before="stream_products"), lowering="inductor")[-2] == "scale"
    assert names(Scale(before="stream_products"))[-1] == "scale"
    assert names(Scale("one"), Scale("two"))[-3:] == ["one", "two", "clean_up"]


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ([Scale(before="no_such_pass")], "wants to run before 'no_such_pass'; there are canon"),
        ([Scale(), Scale()], "two passes are named 'scale'"),
        ([Scale(name="clean_up")], "has a pass named 'clean_up' already"),
        ([Scale(name="a/b")], "must be a word"),
        ([lambda graph: None], "a pass is an object with a `name`"),
        ([Scale], "a pass is an object with a `name`"),
        ("scale", "must be a list of pass objects"),
        ([Quiet()], "pass quiet returned None; a pass returns a PassReport"),
    ],
)
def test_bad_passes(passes: Any, message: str) -> None:
    fast = compiled(tiny(), plan=nbl.Plan(), passes=passes)
    with pytest.raises(ConfigError, match=message):
        output(fast, text())


def test_a_pass_is_verified() -> None:
    fast = compiled(tiny(), plan=nbl.Plan(), passes=[ForgetsAnOutput()])
    with pytest.raises(Exception, match="pass forgets changed the inputs or outputs"):
        output(fast, text())
