"""The command line, end to end on a tiny saved model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.command_line import call
from helpers.saved_model import save_tiny_llama

from nbl_compiler import Plan
from nbl_compiler.text import PYTHON_DOCS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


def make_plan(monkeypatch, capsys, folder: Path, path: Path, *more: object) -> dict:
    words = ("calibrate", folder, path, "--tokens", 1024, "--length", 64, "--quiet", "--json")
    status, out, err = call(monkeypatch, capsys, *words, *more)
    assert status == 0, err
    return json.loads(out)


def test_calibrate_writes_the_plan_it_reports(monkeypatch, capsys, folder, tmp_path):
    path = tmp_path / "plan.safetensors"
    report = make_plan(monkeypatch, capsys, folder, path, "--count", 2)
    plan = Plan.load(path)
    assert report["digest"] == plan.digest
    assert len(plan.rewritten) == 2
    assert len(plan.sites) == 4  # attention alone was asked for


def test_calibrate_folds_ffns_as_well(monkeypatch, capsys, folder, tmp_path):
    path = tmp_path / "plan.safetensors"
    words = ("--count", 1, "--ffn-layers", "0,2", "--keep", 0.5)
    make_plan(monkeypatch, capsys, folder, path, *words)
    plan = Plan.load(path)
    folded = [site for site in plan.rewritten if site.kind == "ffn"]
    assert [site.name for site in folded] == ["model.layers.0.mlp", "model.layers.2.mlp"]
    assert all(site.details["kept"] * 2 == site.details["neurons"] for site in folded)
    assert len(plan.rewritten) == 3
    assert len(plan.sites) == 8


@pytest.mark.usefixtures("fixed_rates")
def test_plan_writes_what_the_budget_picks(monkeypatch, capsys, folder, tmp_path):
    path, plot = tmp_path / "plan.safetensors", tmp_path / "front.svg"
    words = ("--max-loss", "30%", "--context", 64, "--tokens", 2048, "--plot", plot, "--json")
    status, out, err = call(monkeypatch, capsys, "plan", folder, path, *words, "--quiet")
    assert status == 0, err
    report = json.loads(out)
    plan = Plan.load(path)
    assert report["digest"] == plan.digest
    chosen = report["points"][report["chosen"]]
    assert chosen["loss"] <= 0.3
    assert sorted(chosen["choices"]) == sorted(site.name for site in plan.rewritten)
    assert plot.read_text().startswith("<?xml")


def test_refit_writes_a_new_plan(monkeypatch, capsys, folder, tmp_path):
    path, out_path = tmp_path / "plan.safetensors", tmp_path / "new.safetensors"
    make_plan(monkeypatch, capsys, folder, path, "--count", 2)
    words = (path, out_path, "--tokens", 4096, "--folder", tmp_path / "run", "--quiet", "--json")
    status, out, err = call(monkeypatch, capsys, "refit", folder, *words)
    assert status == 0, err
    report = json.loads(out)
    old, new = Plan.load(path), Plan.load(out_path)
    assert report["digest"] == new.digest != old.digest
    assert report["loss_after"] <= report["loss_before"]
    assert [site.name for site in new.rewritten] == [site.name for site in old.rewritten]
    assert not (tmp_path / "run").exists()


def test_calibrate_can_leave_attention_alone(monkeypatch, capsys, folder, tmp_path):
    path = tmp_path / "plan.safetensors"
    words = ("--no-attention", "--ffn-count", 1, "--guard", "predicted", "--capacity", 0.2)
    make_plan(monkeypatch, capsys, folder, path, *words)
    (site,) = Plan.load(path).rewritten
    assert (site.kind, site.details["guard"]) == ("ffn", "predicted")


def test_calibrate_takes_layers_and_a_text_file(monkeypatch, capsys, folder, tmp_path):
    text = tmp_path / "words.txt"
    text.write_text("attention is a mixing of tokens. " * 200)
    path = tmp_path / "plan.safetensors"
    words = ("--layers", "0,-1", "--text", text, "--mixed")
    make_plan(monkeypatch, capsys, folder, path, *words)
    sites = Plan.load(path).rewritten
    assert [site.name for site in sites] == ["model.layers.0.self_attn", "model.layers.3.self_attn"]
    assert all(site.details["mixed"] for site in sites)


def test_eval_reports_dense_nbl_and_dropped(monkeypatch, capsys, folder, tmp_path):
    path = tmp_path / "plan.safetensors"
    make_plan(monkeypatch, capsys, folder, path, "--count", 1)
    words = ("eval", folder, path, "--tokens", 512, "--length", "32,64", "--drop", "--quiet")
    status, out, _ = call(monkeypatch, capsys, *words, "--json")
    found = json.loads(out)
    assert status == 0
    assert [row["length"] for row in found["lengths"]] == [32, 64]
    for row in found["lengths"]:
        assert row["ratio"]["value"] == pytest.approx(row["nbl"] / row["dense"])
        assert len({row["dense"], row["nbl"], row["dropped"]}) == 3
    status, out, _ = call(monkeypatch, capsys, *words, "--prompts", 2, "--new-tokens", 4)
    assert status == 0
    for title in ("perplexity", "loss along rows of 64 tokens", "2 prompts continued greedily"):
        assert title in out


def test_generate_with_and_without_a_plan(monkeypatch, capsys, folder, tmp_path):
    path = tmp_path / "plan.safetensors"
    make_plan(monkeypatch, capsys, folder, path, "--count", 4)
    words = ("generate", folder, "once", "--new-tokens", 6, "--lowering", "eager", "--json")
    for more in ((), ("--plan", path)):
        status, out, err = call(monkeypatch, capsys, *words, *more)
        assert status == 0, err
        made = json.loads(out)
        assert made["text"].startswith("once")
        assert 1 <= made["new_tokens"] <= 6


def test_explain_says_why(monkeypatch, capsys, folder, tmp_path):
    path = tmp_path / "plan.safetensors"
    make_plan(monkeypatch, capsys, folder, path, "--count", 1)
    status, out, _ = call(monkeypatch, capsys, "explain", folder, "--plan", path, "--json")
    report = json.loads(out)
    assert status == 0
    assert len(report["matched"]) == 8  # attention and FFNs
    assert len(report["rewritten"]) == 1
    assert all("rank" in why for site, why in report["reasons"].items() if "attn" in site)
    assert all("does not know" in why for site, why in report["reasons"].items() if "mlp" in site)


def test_explain_writes_a_report_to_open(monkeypatch, capsys, folder, tmp_path):
    path, page = tmp_path / "plan.safetensors", tmp_path / "report.html"
    make_plan(monkeypatch, capsys, folder, path, "--count", 1)
    words = ("--plan", path, "--html", page, "--measure", "--lowering", "eager", "--json")
    status, out, _ = call(monkeypatch, capsys, "explain", folder, *words)
    assert status == 0
    sites = json.loads(out)["sites"]
    assert [site["state"] for site in sites if site["measured_ms"]] == ["rewritten"]
    assert "8 sites match, 1 are rewritten" in page.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("calibrate", "{folder}", "{tmp}/none/plan.safetensors"), "does not exist"),
        (("calibrate", "{tmp}/no-model", "{tmp}/p.safetensors"), "cannot load"),
        (("calibrate", "{folder}", "{tmp}/p", "--text", "{tmp}/no.txt"), "no text file"),
        (("calibrate", "{folder}", "{tmp}/p", "--ridge", "much"), "neither 'auto' nor a number"),
        (("calibrate", "{folder}", "{tmp}/p", "--count", "9", "--quiet"), "count=9 exceeds"),
        (("calibrate", "{folder}", "{tmp}/p", "--dtype", "float9"), "unknown"),
        (("plan", "{folder}", "{tmp}/p", "--max-loss", "much"), "'much' is no share: give 2%"),
        (("plan", "{folder}", "{tmp}/p"), "give either max_loss or speedup"),
        (("plan", "{folder}", "{tmp}/none/p", "--speedup", "2"), "does not exist"),
        (("refit", "{folder}", "{tmp}/none", "{tmp}/p2"), "/none"),
        (("eval", "{folder}", "{tmp}/missing.safetensors"), "no plan at"),
        (("bench", "{folder}", "{folder}/model.safetensors"), "holds no nbl plan"),
    ],
)
def test_a_users_mistake_is_one_line_and_status_one(
    monkeypatch, capsys, folder, tmp_path, words, message
):
    filled = [word.format(folder=folder, tmp=tmp_path) for word in words]
    status, _, err = call(monkeypatch, capsys, *filled)
    assert status == 1
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not list(tmp_path.glob("p*"))  # nothing half-written


def test_every_command_has_help(monkeypatch, capsys):
    for command in ("calibrate", "plan", "refit", "explain", "eval", "generate", "bench", "demo"):
        status, out, _ = call(monkeypatch, capsys, command, "--help")
        assert status == 0
        assert "Usage" in out
        assert PYTHON_DOCS in out or command not in ("calibrate", "plan", "refit", "eval")


def test_export_writes_a_folder_for_vllm(monkeypatch, capsys, folder, tmp_path):
    path, out = tmp_path / "plan.safetensors", tmp_path / "served"
    make_plan(monkeypatch, capsys, folder, path, "--count", 1)
    status, printed, err = call(monkeypatch, capsys, "export", folder, path, out, "--json")
    assert status == 0, err
    report = json.loads(printed)
    assert report["digest"] == Plan.load(path).digest
    assert report["architecture"] == "NBLLlamaForCausalLM"
    assert (out / "tokenizer.json").is_file()
    status, _, err = call(monkeypatch, capsys, "export", folder, path, out)
    assert status == 1
    assert err.count("\n") == 1
    assert "exists already" in err
