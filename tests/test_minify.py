"""``nbl minify``: the smallest part of a dumped graph that fails."""

from __future__ import annotations

import copy
import json
import operator
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.dumping import dumped, execute, last_file, plan_for
from helpers.tiny import tiny
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, symbolic_trace

import nbl_compiler as nbl
from nbl_compiler import cli
from nbl_compiler.dumps import failure
from nbl_compiler.dumps.compare import largest_error, tolerance_for
from nbl_compiler.dumps.failure import Check, Failure
from nbl_compiler.errors import ConfigError, ToolchainError
from nbl_compiler.minify import minify
from nbl_compiler.minify_graph import count_calls, shrink

TOLERANCE = 1e-3


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A dump of one graph: one layer, its attention linear."""
    model = tiny(layers=1)
    dumped(tmp_path, model, plan_for(model, layers=1), 4)
    return tmp_path


def lower_wrongly(monkeypatch: pytest.MonkeyPatch, wrong: Callable[[GraphModule], None]) -> None:
    """Let every lowering change the graph first."""
    right = failure.lower

    def lower(graph_module: GraphModule, inputs: Sequence[Any], *more: Any) -> Any:
        changed = GraphModule(graph_module, copy.deepcopy(graph_module.graph))
        wrong(changed)
        changed.recompile()
        return right(changed, inputs, *more)

    monkeypatch.setattr(failure, "lower", lower)


def silu_as_gelu(graph_module: GraphModule) -> None:
    for node in graph_module.graph.find_nodes(op="call_function", target=F.silu):
        node.target = F.gelu
        node.kwargs = {}


def body(file: Path) -> list[str]:
    """Return the statements of a dumped file's graph, without shapes and comments."""
    text = re.sub(r'(: "[^"]*"|;  (\w+ = )+None|#.*)', "", file.read_text())
    inside = text[text.index("    ):\n") + 7 : text.index("\n\nif __name__")]
    return [line.strip() for line in inside.splitlines() if line.strip()]


def test_nothing_fails_in_a_sound_dump(root: Path) -> None:
    (result,) = minify(root)
    assert result.failure is None
    assert result.written is None
    assert str(result) == "graph_000/07.clean_up.after.py: nothing fails"
    assert not list(root.rglob("minified*"))


def test_the_smallest_graph_holds_the_wrong_op_and_nothing_else(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lower_wrongly(monkeypatch, silu_as_gelu)
    (result,) = minify(root / "graph_000")
    assert result.failure is not None
    assert result.failure.kind == "mismatch"
    assert result.nodes[0] > 20
    assert result.nodes[1] == 1
    assert result.written == root / "graph_000" / "minified.py"
    call, returned = body(result.written)
    assert re.fullmatch(r"silu = torch\.nn\.functional\.silu\(\w+\)", call)
    assert returned == "return (silu,)"
    text = result.written.read_text()
    assert "# the smallest part of 07.clean_up.after.py that fails\n# fails: aot_eager" in text
    assert "activations.py" in text  # the line of the model's code is kept
    assert '"f32[4, 4, 48]"' in text


def test_the_smallest_graph_runs_alone_and_can_be_minified_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        lower_wrongly(patch, silu_as_gelu)
        (first,) = minify(root)
        assert first.written is not None
        (again,) = minify(first.written)
        assert again.nodes == (1, 1)
    done = execute(first.written)  # where the lowering is right
    assert "aot_eager against eager: relative error 0.00e+00" in done.stdout, done.stderr
    (right,) = minify(first.written)
    assert right.failure is None


def test_an_op_that_is_wrong_together_with_another_keeps_both() -> None:
    """A wrong fusion: the failure needs two neighbouring calls."""

    def check(graph_module: GraphModule, inputs: Sequence[Any]) -> Failure | None:
        graph_module(*inputs)
        fused = [
            node
            for node in graph_module.graph.find_nodes(op="call_function", target=F.silu)
            if any(user.target is operator.mul for user in node.users)
        ]
        return Failure("mismatch", "a wrong fusion") if fused else None

    def program(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        a = F.relu(x + 1)
        return ((F.silu(a) * y.cos()).sum() + a.mean(), y)

    graph_module = symbolic_trace(program)
    smallest, values = shrink(graph_module, [torch.randn(3), torch.randn(3)], check, "mismatch")
    assert count_calls(smallest) == 2
    assert check(smallest, values) is not None


def test_writes_that_the_failure_does_not_need_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph = Graph()
    cache_node, x_node = graph.placeholder("cache"), graph.placeholder("x")
    graph.call_method("add_", (cache_node, 1))
    graph.call_function(operator.setitem, (cache_node, 0, 2.0))
    called = graph.call_function(F.silu, (graph.call_function(operator.add, (x_node, 1)),))
    graph.output((called, cache_node))
    lower_wrongly(monkeypatch, silu_as_gelu)
    graph_module = GraphModule(nn.Module(), graph)
    cache, x = torch.zeros(2, 4), torch.linspace(-2, 2, 8).reshape(2, 4)
    check = Check("aot_eager", TOLERANCE)
    found = check(graph_module, [cache, x])
    assert found is not None
    assert torch.equal(cache, torch.zeros(2, 4))  # the check does not write into what it is given
    smallest, values = shrink(graph_module, [cache, x], check, found.kind)
    assert [n.target for n in smallest.graph.nodes if n.op == "call_function"] == [F.silu]
    assert count_calls(smallest) == 1
    assert len(values) == 1


def test_a_nan_is_traced_to_the_op_that_makes_it() -> None:
    def program(x: Tensor) -> tuple[Tensor]:
        hidden = (x * 2).relu() - 3
        return (torch.tanh(torch.log(hidden)) + 1,)

    check = Check("aot_eager", TOLERANCE)
    graph_module = symbolic_trace(program)
    found = check(graph_module, [torch.linspace(-1, 4, 6)])
    assert found == Failure("NaN", "the graph itself returns NaN, run eagerly")
    smallest, values = shrink(graph_module, [torch.linspace(-1, 4, 6)], check, "NaN")
    assert [n.target for n in smallest.graph.nodes if n.op == "call_function"] == [torch.log]
    assert not values[0].isnan().any()


def test_the_infinities_of_a_mask_are_no_failure() -> None:
    def program(x: Tensor) -> tuple[Tensor]:
        return (x.masked_fill(x > 0, float("-inf")),)

    assert Check("aot_eager", TOLERANCE)(symbolic_trace(program), [torch.randn(5)]) is None


def test_a_lowering_that_raises_is_cut_down_too(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(graph_module: GraphModule) -> None:
        if graph_module.graph.find_nodes(op="call_function", target=F.silu):
            raise KeyError("no kernel for silu")

    lower_wrongly(monkeypatch, refuse)
    (result,) = minify(root)
    assert result.failure == Failure("KeyError", "aot_eager raises KeyError: 'no kernel for silu'")
    assert result.nodes[1] == 1


def test_a_missing_compiler_is_no_failure_of_the_graph(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(graph_module: GraphModule) -> None:
        raise ToolchainError("no C++ compiler")

    lower_wrongly(monkeypatch, no_compiler)
    with pytest.raises(ToolchainError, match=r"no C\+\+ compiler"):
        minify(root, "inductor")


def test_an_exact_pass_that_changes_the_outputs_is_named(root: Path) -> None:
    after = root / "graph_000" / "07.clean_up.after.py"
    after.write_text(after.read_text().replace("functional.silu(", "functional.gelu("))
    (result,) = minify(root)
    assert result.failure is None
    (found,) = result.failing_passes
    assert found.name == "07.clean_up"
    assert found.node == "silu"
    assert found.error > TOLERANCE
    assert "pass 07.clean_up should be exact, and changes the outputs" in str(result)


def test_a_rewriting_pass_may_change_the_outputs(root: Path) -> None:
    folder = root / "graph_000"
    (result,) = minify(folder / "03.linearize_attention.after.py")
    assert result.failing_passes == ()


def test_all_graphs_are_checked_up_to_the_first_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dumped(tmp_path, tiny(layers=1), nbl.Plan(), 4, 6)
    assert [result.failure for result in minify(tmp_path)] == [None, None]
    lower_wrongly(monkeypatch, silu_as_gelu)
    assert len(minify(tmp_path)) == 1


@pytest.mark.parametrize(
    ("expected", "actual", "error"),
    [
        (torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5]), 0.1),
        (torch.tensor([0.0]), torch.tensor([0.0]), 0.0),
        (torch.tensor([0.0]), torch.tensor([2.0]), 2.0),
        (torch.tensor([1.0, torch.inf]), torch.tensor([1.0, torch.inf]), 0.0),
        (torch.tensor([1.0, torch.inf]), torch.tensor([1.0, -torch.inf]), torch.inf),
        (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan]), 0.0),
        (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.inf]), torch.inf),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, torch.nan]), torch.inf),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), torch.inf),
        (torch.ones(2), torch.ones(3), torch.inf),
        (torch.ones(2), torch.ones(2).double(), torch.inf),
        (torch.tensor([3 + 4j]), torch.tensor([3 + 4.5j]), 0.1),
        ((torch.ones(2), 3), (torch.ones(2), 3), 0.0),
        ((torch.ones(2), 3), (torch.ones(2), 4), torch.inf),
        ((torch.ones(2),), (torch.ones(2), 4), torch.inf),
    ],
)
def test_the_relative_error(expected: Any, actual: Any, error: float) -> None:
    assert largest_error(expected, actual) == pytest.approx(error)


def test_the_tolerance_is_that_of_the_coarsest_dtype() -> None:
    wide, narrow = torch.ones(1), torch.ones(1, dtype=torch.bfloat16)
    assert tolerance_for([wide, 3]) < tolerance_for([wide, narrow]) == tolerance_for([narrow])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "is no dump; write one with"),
        ("empty", "is no dump; write one with"),
        ("graph_000/summary.md", "summary.md is no dumped graph"),
        ("elsewhere/00.dynamo.py", r"inputs.json is missing"),
    ],
)
def test_what_is_no_dump_is_refused(root: Path, name: str, message: str) -> None:
    (root / "empty").mkdir()
    (root / "elsewhere").mkdir()
    (root / "elsewhere" / "00.dynamo.py").write_text(last_file(root / "graph_000").read_text())
    with pytest.raises(ConfigError, match=message):
        minify(root / name)


def test_the_lowering_must_lower(root: Path) -> None:
    with pytest.raises(ConfigError, match="lowering='eager' must be aot_eager or inductor"):
        minify(root, "eager")


def test_the_command_line(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["nbl", "minify", str(root)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert capsys.readouterr().out == "graph_000/07.clean_up.after.py: nothing fails\n"
    lower_wrongly(monkeypatch, silu_as_gelu)
    monkeypatch.setattr(sys, "argv", ["nbl", "minify", str(root), "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    (result,) = json.loads(capsys.readouterr().out)
    assert result["failure"] == "mismatch"
    assert (result["calls_left"], Path(result["written"]).name) == (1, "minified.py")
    monkeypatch.setattr(sys, "argv", ["nbl", "minify", str(root / "none")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith(f"nbl: {root / 'none'} is no dump")
