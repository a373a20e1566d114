"""Dumped graphs are read back as they were written, and compute what was compiled."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers.dumping import dumped, graph_folders, last_file, outputs_of, plan_for
from helpers.scenarios import full_inputs, subject
from helpers.tiny import compiled, output, tiny
from torch import nn

import nbl_compiler as nbl
from nbl_compiler.dumps.inputs import describe, read_inputs, write_inputs
from nbl_compiler.dumps.parse import load_graph, parse
from nbl_compiler.dumps.source import as_file, class_source
from nbl_compiler.dumps.tensor_store import TensorStore
from nbl_compiler.errors import ConfigError


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The dumps of one model's two graphs; the second is traced with symbolic sizes."""
    model = tiny()
    return dumped(tmp_path_factory.mktemp("dumps"), model, plan_for(model), 8, 12)


def statements(code: str) -> list[str]:
    """Return the lines of a dumped graph without imports and shapes."""
    code = re.sub(r': "[^"]*"', "", code[code.index("class GraphModule") :])  # shapes
    return [line for line in code.split('\n\nif __name__ == "__main__"')[0].splitlines() if line]


class Awkward(nn.Module):
    """Writes in place, branches, maps over a batch, and holds an infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("state", torch.zeros(3, 4))

    def forward(self, x: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
        state = self.state
        state.add_(1)
        state[0] = x[0]
        state += count
        y = nn.functional.linear(x + state, self.weight).T
        z = torch.cond(y.sum() > 0, lambda a: a.sin() * 2, lambda a: a.cos(), (y,))
        mapped = torch.func.vmap(lambda a: a * 2)(x)
        return torch.full((2,), float("-inf")) + count, z**-2, -mapped, x[1:, None, ..., ::2]


def test_awkward_graphs_run_alone_and_are_read_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Awkward(), torch.randn(3, 4)
    options = {"lowering": "eager", "plan": nbl.Plan(), "dump_dir": tmp_path}
    with torch.no_grad():
        expected = torch.compile(model, backend="nbl", options=options)(x, 3)
    file = tmp_path / "graph_000" / "00.dynamo.py"
    for made, wanted in zip(outputs_of(file, tmp_path / "outputs"), expected, strict=True):
        torch.testing.assert_close(made, wanted)
    graph_module, inputs = load_graph(file, file.with_name("inputs.json"))
    assert statements(class_source(graph_module)) == statements(file.read_text())
    with torch.no_grad():
        again = graph_module(*inputs)
    for made, wanted in zip(again, expected, strict=True):
        torch.testing.assert_close(made, wanted)


@pytest.mark.parametrize("which", [0, 1])
def test_reading_a_file_back_gives_the_graph_that_was_written(
    folders: list[Path], which: int
) -> None:
    for file in (folders[which] / "00.dynamo.py", last_file(folders[which])):
        written = file.read_text()
        assert statements(class_source(parse(written, file.name))) == statements(written)


@pytest.mark.parametrize("name", ["gpt2", "falcon", "mixtral", "t5"])
def test_dumps_of_other_families_compute_what_was_compiled(name: str, tmp_path: Path) -> None:
    one = subject(name, "sdpa")
    fast = compiled(one.model, plan=one.plan, dump_dir=tmp_path)
    expected = output(fast, **full_inputs(name))
    (folder,) = graph_folders(tmp_path)
    graph_module, inputs = load_graph(last_file(folder), folder / "inputs.json")
    with torch.no_grad():
        returned = graph_module(*inputs)
    (found,) = [x for x in returned if x.shape == expected.shape]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "damage",
    [
        ("class GraphModule", "class Another"),
        ("return (", "yield ("),
        ("torch.sin", "torch.sinister"),
        ("y = torch.sin(x)", "y = z"),
        ("x[0] = y;  setitem = x", "x[0] = y"),
        ("def forward(", "def forward("[:-1]),
    ],
)
def test_a_damaged_file_is_refused_by_name(damage: tuple[str, str]) -> None:
    sound = (
        "import torch\n\nclass GraphModule(torch.nn.Module):\n    def forward(self, x):\n"
        "        y = torch.sin(x)\n        x[0] = y;  setitem = x\n        return (setitem,)\n"
    )
    assert len(parse(sound, "sound.py").graph.nodes) == 4
    with pytest.raises(ConfigError, match=r"broken.py is no dumped graph \("):
        parse(sound.replace(*damage), "broken.py")


def doubled(x: torch.Tensor) -> torch.Tensor:
    """A function of no package, as a pass of one's own may bring into a graph."""
    return x * 2


def test_functions_from_elsewhere_are_imported(tmp_path: Path) -> None:
    graph = torch.fx.Graph()
    graph.output((graph.call_function(doubled, (graph.placeholder("x"),)),))
    code = class_source(torch.fx.GraphModule(nn.Module(), graph))
    assert f"from {__name__} import doubled as " in code
    (node,) = parse(as_file(code, [], "inputs.json"), "a test").graph.find_nodes(
        op="call_function", target=doubled
    )
    assert node.args[0].target == "x"


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6, dtype=torch.int32).reshape(2, 3),
        torch.randn(3, 4, dtype=torch.bfloat16).t(),
        torch.randn(2, 12)[:, 4:8],
        torch.randn(1, 4).expand(3, 4),
        torch.tensor([True, False]),
        torch.randn(3, dtype=torch.complex64),
        torch.tensor(2.5, dtype=torch.float64),
        torch.zeros(0, 3),
        torch.tensor([float("nan"), float("inf")]),
    ],
    ids=["int32", "transposed", "slice", "expanded", "bool", "complex", "scalar", "empty", "nan"],
)
def test_a_tensor_comes_back_as_it_was(tensor: torch.Tensor, tmp_path: Path) -> None:
    store = TensorStore(tmp_path / "tensors")
    entry = describe("x", tensor, store)
    write_inputs(tmp_path / "inputs.json", {"x": entry}, {}, store)
    found = read_inputs(tmp_path / "inputs.json")[0]["x"]
    torch.testing.assert_close(found, tensor, rtol=0, atol=0, equal_nan=True)
    assert found.stride() == tensor.stride()
    (file,) = (tmp_path / "tensors").iterdir()
    assert file.stat().st_size < 200 + tensor.untyped_storage().nbytes()
