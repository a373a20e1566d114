"""``options={"dump_dir": ...}``: what is written, that it runs alone, and what it says."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import torch
from helpers.dumping import dumped, execute, graph_folders, last_file, outputs_of, plan_for
from helpers.tiny import calibrated, compiled, output, text, texts, tiny
from torch import nn

import nbl_compiler as nbl
from nbl_compiler import plan_file
from nbl_compiler.backend import nbl as compile_graph
from nbl_compiler.dumps.inputs import describe, read_inputs
from nbl_compiler.dumps.tensor_store import TensorStore
from nbl_compiler.errors import ConfigError

PASSES = ["canonicalize", "match_attention", "linearize_attention", "drop_cache_updates"]
LENGTHS = (8, 12)


@pytest.fixture(scope="module")
def plan() -> nbl.Plan:
    return plan_for(tiny())


@pytest.fixture(scope="module")
def folders(plan: nbl.Plan, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The dumps of one model's two graphs; the second is traced with symbolic sizes."""
    return dumped(tmp_path_factory.mktemp("two graphs") / "dumps", tiny(), plan, *LENGTHS)


def test_every_graph_has_its_folder_of_numbered_files(folders: list[Path]) -> None:
    assert [f.name for f in folders] == ["graph_000", "graph_001"]
    for folder in folders:
        names = sorted(f.name for f in folder.iterdir() if f.suffix != ".diff")
        assert names[0] == "00.dynamo.py"
        assert names[-2:] == ["inputs.json", "summary.md"]
        numbered = [re.fullmatch(r"(\d\d)\.(\w+)\.(before|after)\.py", n) for n in names[1:-2]]
        assert all(numbered)
        steps = [(int(m[1]), m[2]) for m in numbered if m is not None and m[3] == "after"]
        assert [number for number, _ in steps] == list(range(1, len(steps) + 1))
        assert [name for _, name in steps][: len(PASSES)] == PASSES
        assert len(names) == 3 + 2 * len(steps)


def test_dumps_are_python_and_say_what_happened(folders: list[Path]) -> None:
    folder = folders[0]
    for file in folder.glob("*.py"):
        ast.parse(file.read_text())
    before = (folder / "03.linearize_attention.before.py").read_text()
    after = (folder / "03.linearize_attention.after.py").read_text()
    assert "# pass: linearize_attention, after\n# time: " in after
    assert "# rewritten: model.layers.1.self_attn\n" in after
    assert "# left alone: model.layers.0.self_attn: left dense by the test\n" in after
    assert "modeling_llama.py" in after  # the lines of the model's code
    call = re.compile(r"= torch\._C\._nn\.scaled_dot_product_attention\(")
    assert len(call.findall(before)) == 2
    assert len(call.findall(last_file(folder).read_text())) == 1


def test_the_summary_fits_on_a_page(folders: list[Path], plan: nbl.Plan) -> None:
    summary = (folders[0] / "summary.md").read_text()
    assert plan.digest in summary
    assert "- linearize_attention: `model.layers.1.self_attn` rewritten" in summary
    assert "`model.layers.0.self_attn` left alone: left dense by the test" in summary
    assert len(summary.splitlines()) < 60


def test_the_summary_says_why_a_graph_was_compiled(folders: list[Path]) -> None:
    first, second = ((folder / "summary.md").read_text() for folder in folders)
    assert "compiled because: first compilation of this code\n" in first
    (why,) = re.findall("compiled because: (.*)", second)
    assert re.search(r"size mismatch at index 1\. expected 8, actual 12", why)
    assert "generic.py" in second  # the code: transformers' wrapper of forward
    assert "[0/1]" in second


def test_a_call_outside_dynamo_says_so(tmp_path: Path) -> None:
    graph_module = torch.fx.symbolic_trace(nn.ReLU())
    options = {"plan": nbl.Plan(), "lowering": "eager", "dump_dir": tmp_path}
    compile_graph(graph_module, [torch.ones(2)], options=options)
    summary = (tmp_path / "graph_000" / "summary.md").read_text()
    assert "compiled because: the backend was called outside Dynamo" in summary


def test_a_changed_dtype_is_named_as_the_reason(tmp_path: Path) -> None:
    fast = compiled(tiny(layers=1), plan=nbl.Plan(), dump_dir=tmp_path)
    output(fast, text(length=8))
    output(fast, text(length=8).int())
    why = (graph_folders(tmp_path)[1] / "summary.md").read_text()
    assert "dtype mismatch" in why


def test_diffs_show_what_a_pass_changed_and_nothing_else(folders: list[Path]) -> None:
    folder = folders[0]
    diff = (folder / "03.linearize_attention.diff").read_text().splitlines()
    assert diff[:2] == [
        "--- 03.linearize_attention.before.py",
        "+++ 03.linearize_attention.after.py",
    ]
    added = [line for line in diff[2:] if line.startswith("+")]
    removed = [line for line in diff[2:] if line.startswith("-")]
    assert sum("nbl_model_layers_1_self_attn_weight" in line for line in added) == 2
    assert len(added) == 4  # two inputs, the linear map, and the residual that reads it
    assert len(removed) == 1
    for name in ("02.match_attention", "05.match_ffn"):
        assert (folder / f"{name}.after.py").exists()
        assert not (folder / f"{name}.diff").exists()


@pytest.mark.parametrize("which", [0, 1])
def test_a_file_run_alone_returns_what_the_compiled_model_returns(
    folders: list[Path], plan: nbl.Plan, tmp_path: Path, which: int
) -> None:
    given = text(length=LENGTHS[which])
    expected = output(compiled(tiny(), plan=plan), given)
    dense = output(tiny(), given)
    assert not torch.allclose(expected, dense, atol=1e-2)
    *_, logits = outputs_of(last_file(folders[which]), tmp_path / "after")
    torch.testing.assert_close(logits, expected)
    *_, logits = outputs_of(folders[which] / "00.dynamo.py", tmp_path / "traced")
    torch.testing.assert_close(logits, dense)


def test_a_file_run_alone_prints_shapes_and_checksums(folders: list[Path]) -> None:
    folder = folders[0]
    traced, matched, after = (
        execute(file).stdout.splitlines()
        for file in (
            folder / "00.dynamo.py",
            folder / "02.match_attention.after.py",
            last_file(folder),
        )
    )
    assert traced[0] == "00.dynamo.py, eager"
    line = re.compile(r"  output 4: float32\[4, 8, 64\], mean \S+, largest \S+, checksum [0-9a-f]+")
    assert line.fullmatch(traced[-1])
    assert traced[1:] == matched[1:]
    assert traced[-1] != after[-1]


def test_a_file_can_be_run_lowered(folders: list[Path]) -> None:
    done = execute(last_file(folders[1]), "--lowering", "aot_eager")
    assert re.search(r"aot_eager against eager: relative error \d\.\d+e[-+]\d+ ", done.stdout)


def test_weights_are_stored_once_for_all_graphs(folders: list[Path]) -> None:
    stored = list((folders[0].parent / "tensors").iterdir())
    assert all(re.fullmatch(r"[0-9a-f]{32}\.safetensors", file.name) for file in stored)
    weights = {*tiny().parameters()}
    tokens, buffers, maps = len(LENGTHS), 1, 2
    assert len(stored) == len(weights) + tokens + buffers + maps


def test_random_weights_are_not_stored(plan: nbl.Plan, tmp_path: Path) -> None:
    (folder,) = dumped(tmp_path, tiny(), plan, 8, dump_inputs="random")
    tokens, buffers, maps = 1, 1, 2
    assert len(list((tmp_path / "tensors").iterdir())) == tokens + buffers + maps
    inputs, _ = read_inputs(folder / "inputs.json")
    weight = tiny().lm_head.weight.detach()
    name = "L_self_modules_lm_head_parameters_weight_"
    assert inputs[name].shape == weight.shape
    assert not torch.equal(inputs[name], weight)
    assert float(inputs[name].std()) == pytest.approx(float(weight.std()), rel=0.1)
    torch.testing.assert_close(
        inputs["nbl_model_layers_1_self_attn_bias"], plan.rewritten[0].tensors["bias"]
    )
    header = last_file(folder).read_text()
    assert "weights are random (dump_inputs='random')" in header
    assert execute(last_file(folder)).stdout == execute(last_file(folder)).stdout != ""


def test_guarded_ffns_and_calibrated_plans_run_alone(tmp_path: Path) -> None:
    model = tiny(layers=1)
    ffn = nbl.FFN(count=1, keep=0, guard="predicted", capacity=0.2)
    plan = nbl.calibrate(model, texts(), nbl.Config(attention=None, ffn=ffn), progress=False)
    nbl.attach(model, None)
    (folder,) = dumped(tmp_path / "dumps", model, plan, 8)
    assert "torch.ops.nbl.guarded_ffn" in last_file(folder).read_text()
    *_, logits = outputs_of(last_file(folder), tmp_path / "after")
    torch.testing.assert_close(logits, output(compiled(model, plan=plan), text(length=8)))


def test_what_cannot_be_stored_is_named_when_the_file_runs(folders: list[Path]) -> None:
    file = folders[0] / "inputs.json"
    content = json.loads(file.read_text())
    content["inputs"]["L_args_0_"] = describe("L_args_0_", torch.Generator(), TensorStore(file))
    broken = file.with_name("broken.json")
    broken.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"input L_args_0_ is a torch.*Generator, which dumps"):
        read_inputs(broken)
    broken.unlink()


def test_a_file_without_its_tensors_says_so(plan: nbl.Plan, tmp_path: Path) -> None:
    (folder,) = dumped(tmp_path, tiny(), plan, 8)
    (tmp_path / "tensors").rename(tmp_path / "elsewhere")
    done = execute(last_file(folder))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "is missing; copy a dump together with its folder tensors" in line


def test_autocast_is_part_of_a_dump(tmp_path: Path) -> None:
    fast = compiled(tiny(layers=1), plan=nbl.Plan(), dump_dir=tmp_path / "dumps")
    with torch.autocast("cpu", torch.bfloat16):
        expected = output(fast, text(length=8))
    assert expected.dtype == torch.bfloat16
    (folder,) = graph_folders(tmp_path / "dumps")
    *_, logits = outputs_of(folder / "00.dynamo.py", tmp_path / "outputs")
    torch.testing.assert_close(logits, expected)


def test_a_model_without_a_plan_is_dumped_as_it_is(tmp_path: Path) -> None:
    (folder,) = dumped(tmp_path, tiny(layers=1), nbl.Plan(), 8)
    assert sorted(f.name for f in folder.iterdir()) == ["00.dynamo.py", "inputs.json", "summary.md"]


def test_folders_of_earlier_runs_are_kept(tmp_path: Path) -> None:
    model = tiny(layers=1)
    first = dumped(tmp_path, model, nbl.Plan(), 8)
    content = (first[0] / "summary.md").read_text()
    second = dumped(tmp_path, model, nbl.Plan(), 12)
    assert len(second) == 2
    assert (first[0] / "summary.md").read_text() == content


def test_the_environment_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NBL_DUMP", str(tmp_path / "all"))
    monkeypatch.setenv("NBL_DUMP_INPUTS", "random")
    output(compiled(tiny(layers=1), plan=nbl.Plan()), text(length=8))
    (folder,) = graph_folders(tmp_path / "all")
    assert '"kind": "random"' in (folder / "inputs.json").read_text()
    torch._dynamo.reset()
    output(compiled(tiny(layers=1), plan=nbl.Plan(), dump_dir=tmp_path / "own"), text(length=8))
    assert len(graph_folders(tmp_path / "own")) == 1
    assert len(graph_folders(tmp_path / "all")) == 1


def test_an_empty_variable_asks_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NBL_DUMP", "")
    monkeypatch.chdir(tmp_path)
    output(compiled(tiny(layers=1), plan=nbl.Plan()), text(length=8))
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_kind_of_inputs_is_refused() -> None:
    with pytest.raises(ConfigError, match="dump_inputs='none' must be one of real, random"):
        output(compiled(tiny(layers=1), plan=nbl.Plan(), dump_inputs="none"), text(length=8))


def test_a_folder_that_fills_up_is_an_error_without_half_written_files(
    plan: nbl.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = plan_file.os.fsync, 0

    def full_after_ten(handle: int) -> None:
        nonlocal written
        written += 1
        if written > 10:
            raise OSError(28, "No space left on device")
        write(handle)

    monkeypatch.setattr(plan_file.os, "fsync", full_after_ten)
    with pytest.raises(ConfigError, match=r"dump_dir .* cannot be written: No space left"):
        dumped(tmp_path, tiny(), plan, 8)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) == 10
    assert {file.suffix for file in files} == {".safetensors"}


def test_dumping_changes_nothing_of_the_result(plan: nbl.Plan, tmp_path: Path) -> None:
    model = tiny()
    expected = output(compiled(model, plan=plan), text(length=8))
    torch._dynamo.reset()
    made = output(compiled(model, plan=plan, dump_dir=tmp_path), text(length=8))
    assert torch.equal(made, expected)


def test_a_calibrated_plan_found_by_itself_is_named(tmp_path: Path) -> None:
    model = tiny(layers=1)
    plan = calibrated(model, count=1)
    output(compiled(model, dump_dir=tmp_path), text(length=8))
    (folder,) = graph_folders(tmp_path)
    assert plan.digest in (folder / "summary.md").read_text()
