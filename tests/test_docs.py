"""The Python of the documentation runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.saved_model import save_tiny_llama
from helpers.tiny import text, texts, tiny
from models.architectures import inputs, make
from transformers import AutoModelForCausalLM, AutoTokenizer

import nbl_compiler as nbl
from nbl_compiler.passes.pipeline import build_pipeline
from nbl_compiler.text import python_docs_parts

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


def blocks(page: str) -> str:
    """Return the Python blocks of a page, one after the other."""
    found = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert found, page
    return "\n".join(found)


def execute(code: str, **names: Any) -> dict[str, Any]:
    exec(compile(code, "<documentation>", "exec"), names)
    return names


def test_quickstart_and_plan_format(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = blocks("docs/quickstart.md").replace("65_536", "4096")
    ran = execute(code, path=folder, documents=python_docs_parts()[0])
    assert len(ran["plan"].rewritten) == 2
    assert ran["again"].logits.isfinite().all()
    assert (tmp_path / "report.html").is_file()
    told = execute(blocks("docs/plan-format.md"), nbl=nbl)
    assert told["plan"].digest == ran["plan"].digest


def test_what_a_plan_costs(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    calibration, held_out = python_docs_parts()
    batches = nbl.token_batches(calibration, tokenizer, tokens=1024, length=128)
    plan = nbl.calibrate(model, batches, progress=False)
    ran = execute(
        blocks("docs/evaluation.md"), model=model, tokenizer=tokenizer, plan=plan, held_out=held_out
    )
    assert [row.length for row in ran["found"].lengths] == [64, 128]


@pytest.mark.usefixtures("fixed_rates")
def test_value_states_planning_and_refit() -> None:
    model = tiny(layers=2)
    batches = [text(batch=8, length=64, seed=seed) for seed in range(4)]
    ran = execute(blocks("docs/value-states.md"), nbl=nbl, model=model, batches=batches)
    assert {"weight", "bias"} < set(ran["site"].tensors)
    assert len(ran["cache"].layers) == 2
    ran = execute(blocks("docs/planning.md"), nbl=nbl, model=model, batches=batches)
    assert len(ran["cheaper"].rewritten) == 1
    plan = nbl.calibrate(model, batches, progress=False)
    ran = execute(blocks("docs/refit.md"), nbl=nbl, model=model, batches=batches, plan=plan)
    assert [s.name for s in ran["better"].rewritten] == [s.name for s in plan.rewritten]


def test_a_quantized_model() -> None:
    model, ids = tiny(layers=2), text(batch=1, length=8)
    code = blocks("docs/quantization.md").replace('backend="nbl")', 'backend="nbl", options=eager)')
    eager = {"lowering": "eager"}
    names = {"nbl": nbl, "torch": torch, "model": model, "batches": texts(), "ids": ids}
    ran = execute(code, **names, eager=eager)
    assert len(ran["plan"].rewritten) == 2
    assert type(model.lm_head.weight).__name__ == "Int8Tensor"
    assert ran["logits"].isfinite().all()


def test_the_readme_s_ten_lines(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = blocks("README.md").replace("65_536", "4096").replace("count=4", "count=1")
    code = code.replace('{"plan":', '{"lowering": "eager", "plan":')
    ran = execute(code, path=folder, documents=python_docs_parts()[0])
    assert len(ran["plan"].rewritten) == 1
    assert ran["logits"].isfinite().all()


@pytest.fixture(scope="module")
def pass_names() -> dict[str, Any]:
    """What the pages of the passes start from: two sites rewritten, and what each pass said."""
    model, ids = tiny(layers=4), text(length=32)
    config = nbl.Config(attention=nbl.Attention(layers=[1]), ffn=nbl.FFN(layers=[2], keep=0.25))
    plan = nbl.calibrate(model, texts(), config, progress=False)
    return execute(blocks("docs/passes/README.md"), model=model, plan=plan, ids=ids, torch=torch)


PAGES = sorted(path.name for path in (ROOT / "docs/passes").glob("*.md") if path.stem != "README")


@pytest.mark.parametrize("page", PAGES)
def test_the_page_of_a_pass(page: str, pass_names: dict[str, Any]) -> None:
    execute(blocks(f"docs/passes/{page}"), **pass_names)


def test_every_pass_has_its_page() -> None:
    names = {step.name for step in build_pipeline(nbl.Plan(), "inductor")}
    assert {f"{name}.md" for name in names} | {"watch_inputs.md"} == set(PAGES)


def test_the_own_pass_of_the_page() -> None:
    options = execute(blocks("docs/own-pass.md"))["options"]
    reports: list[Any] = []
    model = make("gpt2")
    given = {**options, "report": reports.append}
    fast = torch.compile(model, backend="nbl", options=given)
    with torch.no_grad():
        torch.testing.assert_close(
            fast(**inputs("gpt2")).logits, model(**inputs("gpt2")).logits, rtol=0, atol=0
        )
    (run,) = (r for r in reports[0].runs if r.name == "drop_inactive_dropout")
    assert re.fullmatch(r"[1-9]\d* dropouts gone", run.report.notes[0])


def test_links_lead_somewhere() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), (page, target)
