"""``options={"dump_dir": ...}``."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from helpers.plans import random_plan
from helpers.tiny import compiled, output, text, tiny
from models.architectures import BY_NAME, HIDDEN
from torch import nn

import nbl_compiler as nbl

PASSES = ["canonicalize", "match_attention", "linearize_attention", "drop_cache_updates"]


def dumped(tmp_path: Path, model: nn.Module, plan: nbl.Plan, *lengths: int) -> list[Path]:
    fast = compiled(model, plan=plan, dump_dir=tmp_path / "dumps")
    for length in lengths:
        output(fast, text(length=length))
    return sorted((tmp_path / "dumps").iterdir())


def plan_for(model: nn.Module) -> nbl.Plan:
    return random_plan(model, BY_NAME["llama"].site_names(2), [1], HIDDEN)


@pytest.fixture(scope="module")
def plan() -> nbl.Plan:
    return plan_for(tiny())


@pytest.fixture(scope="module")
def folders(plan: nbl.Plan, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The dumps of one model's two graphs."""
    return dumped(tmp_path_factory.mktemp("two graphs"), tiny(), plan, 8, 12)


def test_every_graph_has_its_folder_of_numbered_files(folders: list[Path]) -> None:
    assert [f.name for f in folders] == ["graph_000", "graph_001"]
    for folder in folders:
        names = sorted(f.name for f in folder.iterdir())
        assert names[0] == "00.dynamo.py"
        assert names[-1] == "summary.md"
        numbered = [re.fullmatch(r"(\d\d)\.(\w+)\.(before|after)\.py", n) for n in names[1:-1]]
        assert all(numbered)
        steps = [(int(m[1]), m[2]) for m in numbered if m is not None and m[3] == "after"]
        assert [number for number, _ in steps] == list(range(1, len(steps) + 1))
        assert [name for _, name in steps][: len(PASSES)] == PASSES
        assert len(names) == 2 + 2 * len(steps)


def test_dumps_are_python_and_say_what_happened(folders: list[Path]) -> None:
    folder = folders[0]
    for file in folder.glob("*.py"):
        ast.parse(file.read_text())
    before = (folder / "03.linearize_attention.before.py").read_text()
    after = (folder / "03.linearize_attention.after.py").read_text()
    assert "# pass: linearize_attention, after\n# time: " in after
    assert "# rewritten: model.layers.1.self_attn\n" in after
    assert "# left alone: model.layers.0.self_attn: left dense by the test\n" in after
    last = max(folder.glob("*.after.py")).read_text()
    call = re.compile(r"= torch\._C\._nn\.scaled_dot_product_attention\(")
    assert len(call.findall(before)) == 2
    assert len(call.findall(last)) == 1


def test_the_summary_fits_on_a_page(folders: list[Path], plan: nbl.Plan) -> None:
    summary = (folders[0] / "summary.md").read_text()
    assert plan.digest in summary
    assert "- linearize_attention: `model.layers.1.self_attn` rewritten" in summary
    assert "`model.layers.0.self_attn` left alone: left dense by the test" in summary
    assert len(summary.splitlines()) < 60


def test_a_model_without_a_plan_is_dumped_as_it_is(tmp_path: Path) -> None:
    (folder,) = dumped(tmp_path, tiny(layers=1), nbl.Plan(), 8)
    assert sorted(f.name for f in folder.iterdir()) == ["00.dynamo.py", "summary.md"]


def test_folders_of_earlier_runs_are_kept(tmp_path: Path) -> None:
    model = tiny(layers=1)
    first = dumped(tmp_path, model, nbl.Plan(), 8)
    content = (first[0] / "summary.md").read_text()
    second = dumped(tmp_path, model, nbl.Plan(), 12)
    assert len(second) == 2
    assert (first[0] / "summary.md").read_text() == content
