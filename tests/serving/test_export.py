"""The folder of ``nbl export``: what is in it, what is left out, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from helpers.plans import random_plan
from helpers.tiny import texts, tiny
from models.architectures import HIDDEN
from safetensors.torch import load_file
from torch import nn

import nbl_compiler as nbl
from nbl_compiler.errors import ConfigError, PlanMismatchError
from nbl_compiler.serving.export import export
from nbl_compiler.serving.plan_weights import PlanWeights
from nbl_compiler.serving.refusals import check_servable

LAYERS = 4
KEPT = 12


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny("llama", layers=LAYERS)


@pytest.fixture(scope="module")
def saved(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "params.json").write_text("{}")
    (folder / "consolidated.safetensors").write_bytes(b"Mistral's own format")
    return folder


@pytest.fixture(scope="module")
def plan(model: nn.Module) -> nbl.Plan:
    """Attention of layer 1 linearized, the FFN of layer 2 folded with a quarter kept."""
    config = nbl.Config(
        attention=nbl.Attention(layers=["model.layers.1.self_attn"], input="residual"),
        ffn=nbl.FFN(layers=["model.layers.2.mlp"], keep=0.25),
    )
    return nbl.calibrate(model, texts(), config, progress=False)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_the_folder(saved: Path, plan: nbl.Plan, tmp_path: Path) -> None:
    result = export(saved, plan, tmp_path / "out")
    names = {file.relative_to(tmp_path / "out").as_posix() for file in result.folder.rglob("*")}
    assert names == {
        "config.json", "generation_config.json", "tokenizer.json", "nbl", "nbl/plan.safetensors",
        "weights-00001-of-00001.safetensors",
    }  # fmt: skip
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["NBLLlamaForCausalLM"]
    assert config["nbl"]["digest"] == plan.digest
    assert nbl.Plan.load(tmp_path / "out/nbl/plan.safetensors").digest == plan.digest
    original, out = saved / "model.safetensors", tmp_path / "out/weights-00001-of-00001.safetensors"
    assert out.samefile(original)
    assert (result.linked, result.left_out) == (1, 0)
    copied = export(saved, plan, tmp_path / "copied", copy=True)
    assert copied.linked == 0
    assert not (tmp_path / "copied" / out.name).samefile(original)
    assert (tmp_path / "copied" / out.name).read_bytes() == original.read_bytes()


@pytest.mark.parametrize("load", [hf.AutoModelForCausalLM, hf.LlamaForCausalLM, hf.AutoModel])
@pytest.mark.parametrize("strip", [False, True])
def test_transformers_refuses_it(
    load: Any, strip: bool, saved: Path, plan: nbl.Plan, tmp_path: Path
) -> None:
    export(saved, plan, tmp_path / "out", strip=strip)
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        load.from_pretrained(tmp_path / "out")


def test_strip_leaves_out_what_nothing_reads(
    model: nn.Module, saved: Path, plan: nbl.Plan, tmp_path: Path
) -> None:
    result = export(saved, plan, tmp_path / "out", strip=True)
    before, after = weights_of(saved_alone(saved, tmp_path)), weights_of(tmp_path / "out")
    gone = before.keys() - after.keys()
    projections = ("q_proj", "k_proj", "v_proj", "o_proj")
    assert gone == {
        *(f"model.layers.1.self_attn.{name}.weight" for name in projections),
        "model.layers.1.input_layernorm.weight",  # the map reads the stream in front of it
        "model.layers.2.mlp.down_proj.weight",
    }
    kept = plan.site("model.layers.2.mlp").tensors["kept"]
    assert kept.numel() == KEPT
    for name, weight in after.items():
        rows = name.startswith("model.layers.2.mlp.")
        expected = before[name][kept] if rows else before[name]
        torch.testing.assert_close(weight, expected, rtol=0, atol=0)
    rows = before["model.layers.2.mlp.up_proj.weight"].nbytes * 3 // 4
    left_out = sum(before[name].nbytes for name in gone) + 2 * rows
    assert abs(result.left_out - left_out) < 2_000  # the files' headers


def saved_alone(saved: Path, folder: Path) -> Path:
    """Return a folder with nothing but the model's own weights."""
    alone = folder / "alone"
    alone.mkdir()
    shutil.copy(saved / "model.safetensors", alone)
    return alone


def test_several_files_and_the_fingerprint_of_each(
    model: nn.Module, plan: nbl.Plan, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    files = len(list((tmp_path / "sharded").glob("*.safetensors")))
    assert files > 1
    result = export(tmp_path / "sharded", plan, tmp_path / "out")
    assert result.linked == files
    assert weights_of(tmp_path / "out").keys() == weights_of(tmp_path / "sharded").keys()
    next(iter((tmp_path / "sharded").glob("*.safetensors"))).unlink()
    with pytest.raises(ConfigError, match="lacks model-0"):
        export(tmp_path / "sharded", plan, tmp_path / "again")


def test_what_the_layers_read(model: nn.Module, plan: nbl.Plan) -> None:
    weights = PlanWeights(plan)
    read = dict(weights.through(model.state_dict().items(), multiple_of=8))
    attention, ffn = (plan.site(f"model.layers.{n}").tensors for n in ("1.self_attn", "2.mlp"))
    assert read["model.layers.1.self_attn.map.weight"] is attention["weight"]
    assert read["model.layers.2.mlp.bias"] is ffn["bias"]
    assert not [n for n in read if n.startswith("model.layers.1.self_attn.") and ".map." not in n]
    up, down = (read[f"model.layers.2.mlp.{n}_proj.weight"] for n in ("up", "down"))
    assert (up.shape, down.shape) == ((16, HIDDEN), (HIDDEN, 16))  # 12 neurons in eights
    torch.testing.assert_close(down[:, :KEPT], ffn["down"], rtol=0, atol=0)
    assert not up[KEPT:].any()
    assert not down[:, KEPT:].any()
    assert weights.missing() == []
    assert PlanWeights(plan).missing() == [
        "model.layers.2.mlp.gate_proj.weight", "model.layers.2.mlp.up_proj.weight",
    ]  # fmt: skip
    assert not list(PlanWeights(plan, layers=range(3, 4)).replacements())


def changed(saved: Path, folder: Path, **settings: object) -> Path:
    """Return a copy of the model's folder with another configuration."""
    shutil.copytree(saved, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))
    return folder


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "GPT2LMHeadModel are not served; LlamaForCausalLM",
        ),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"model_type": "llama9"}, "no models of the type 'llama9'"),
        ({"num_kv_shared_layers": 2}, "last 2 layers of this model read the keys"),
        ({"nbl": {}}, "was exported already"),
        ({"num_hidden_layers": 1}, r"site 'model.layers.1.self_attn' is no attention .* 1 layers"),
        ({"intermediate_size": 50}, "no gated FFN of 50 neurons"),
        ({"hidden_size": 48}, "weight for model.layers.1.self_attn has shape"),
    ],
)
def test_models_that_are_refused(
    settings: dict[str, object], reason: str, saved: Path, plan: nbl.Plan, tmp_path: Path
) -> None:
    folder = changed(saved, tmp_path / "model", **settings)
    with pytest.raises((ConfigError, PlanMismatchError), match=reason):
        export(folder, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_configuration_may_leave_defaults_out(
    saved: Path, plan: nbl.Plan, tmp_path: Path
) -> None:
    config = json.loads((saved / "config.json").read_text())
    del config["num_hidden_layers"]
    check_servable(config, plan)
    del config["intermediate_size"]
    with pytest.raises(PlanMismatchError, match="no gated FFN of 11008 neurons"):
        check_servable(config, plan)


def test_plans_that_are_refused(model: nn.Module, saved: Path, tmp_path: Path) -> None:
    names = [f"model.layers.{i}.self_attn" for i in range(LAYERS)]
    every = random_plan(model, names, range(LAYERS), HIDDEN)
    taps = nbl.Config(attention=nbl.Attention(layers=[1], taps=1))
    states = nbl.calibrate(model, texts(), taps, progress=False)
    one = random_plan(model, names, [1], HIDDEN)
    ordinals = (replace(site, name=f"attention.{i}") for i, site in enumerate(one.sites))
    unnamed = replace(one, sites=tuple(ordinals))
    for refused, reason in (
        (every, "linearizes every attention layer"),
        (states, "reads value states, .* without taps"),
        (unnamed, "site 'attention.1' is no attention of this model's 4 layers"),
    ):
        with pytest.raises((ConfigError, PlanMismatchError), match=reason):
            export(saved, refused, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_other_weights_are_refused(saved: Path, plan: nbl.Plan, tmp_path: Path) -> None:
    tiny("llama", seed=5, layers=LAYERS).save_pretrained(tmp_path / "other")
    with pytest.raises(PlanMismatchError, match="is not one that the plan was calibrated on"):
        export(tmp_path / "other", plan, tmp_path / "out")
    swapped = tiny("llama", layers=LAYERS)
    layers = swapped.model.layers
    layers[1].mlp, layers[2].mlp = layers[2].mlp, layers[1].mlp
    swapped.save_pretrained(tmp_path / "swapped")
    with pytest.raises(PlanMismatchError, match=r"does not fit model\.layers\.2\.mlp"):
        export(tmp_path / "swapped", plan, tmp_path / "out")


def test_folders_that_are_refused(saved: Path, plan: nbl.Plan, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        export(saved, plan, tmp_path / "there")
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        export(saved, plan, tmp_path / "nowhere" / "out")
    with pytest.raises(ConfigError, match="holds no model"):
        export(tmp_path / "there", plan, tmp_path / "out")
    bare = changed(saved, tmp_path / "bare")
    (bare / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ConfigError, match="no whole safetensors file"):
        export(bare, plan, tmp_path / "out")
    (bare / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"lacks model\.safetensors; save the model"):
        export(bare, plan, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"there", "bare"}
