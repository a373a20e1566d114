"""What vLLM must not be asked for, refused before an engine starts; and damaged folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
from engines import IN_THIS_PROCESS, serve
from tiny_plans import make_model, random_plan, save
from vllm import EngineArgs
from vllm.config import VllmConfig

from nbl_compiler.errors import PlanFormatError
from nbl_compiler.serving.export import export


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make_model("Llama"), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def exported(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "out"
    plan = random_plan(make_model("Llama"), attention=(0, 1), ffn={2: 24})
    export(saved, plan, folder, strip=True)
    return folder


def configure(folder: Path, **settings: object) -> VllmConfig:
    options = {"dtype": "bfloat16", "skip_tokenizer_init": True, "max_model_len": 64, **settings}
    return EngineArgs(str(folder), **options).create_engine_config()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"enable_lora": True}, "LoRA: .* merge the adapter"),
        ({"quantization": "fp8"}, "quantization='fp8': .* without quantization"),
        ({"runner": "pooling"}, "runner='pooling': only text generation"),
        ({"cpu_offload_gb": 1}, "offloaded to the CPU: .* serve without it"),
        ({"pipeline_parallel_size": 2}, "stage 0 of 2 .layers 0 to 1. has no attention layer left"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_a_plan_cannot_be_served_with(
    settings: dict[str, object], reason: str, exported: Path
) -> None:
    with pytest.raises(ValueError, match=reason):
        configure(exported, **settings)


def test_a_guard_needs_all_neurons(saved: Path, tmp_path: Path) -> None:
    plan = random_plan(make_model("Llama"), guarded=(1,))
    export(saved, plan, tmp_path / "out")
    with pytest.raises(ValueError, match=r"guard of model\.layers\.1\.mlp .* calibrate with guard"):
        configure(tmp_path / "out", tensor_parallel_size=2)


def test_an_empty_plan_asks_for_nothing(saved: Path, tmp_path: Path) -> None:
    export(saved, random_plan(make_model("Llama")), tmp_path / "out")
    assert configure(tmp_path / "out", enable_lora=True).lora_config is not None


def test_the_compile_cache_knows_the_plan(saved: Path, tmp_path: Path) -> None:
    model, hashes = make_model("Llama"), []
    for seed in (1, 2):
        plan = random_plan(model, attention=(1,), seed=seed)
        export(saved, plan, tmp_path / "out")
        hashes.append(configure(tmp_path / "out").compute_hash())
        (tmp_path / "out").rename(tmp_path / str(seed))  # the path is a part of the hash as well
    assert hashes[0] != hashes[1]


def test_another_plan_in_the_folder(saved: Path, tmp_path: Path) -> None:
    model = make_model("Llama")
    export(saved, random_plan(model, attention=(1,)), tmp_path / "out")
    random_plan(model, attention=(2,)).save(tmp_path / "out/nbl/plan.safetensors")
    with pytest.raises(ValueError, match=r"not the plan that config.json names"):
        configure(tmp_path / "out")
    (tmp_path / "out/nbl/plan.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no nbl/plan\.safetensors"):
        configure(tmp_path / "out")


def test_weights_that_are_missing(saved: Path, tmp_path: Path) -> None:
    export(saved, random_plan(make_model("Llama"), ffn={2: 24}), tmp_path / "out", copy=True)
    (file,) = (tmp_path / "out").glob("weights-*.safetensors")
    weights = safetensors.torch.load_file(file)
    del weights["model.layers.2.mlp.up_proj.weight"]
    safetensors.torch.save_file(weights, file)
    with pytest.raises(PlanFormatError, match=r"layers.2.mlp.up_proj.weight did not get loaded"):
        serve(tmp_path / "out", **IN_THIS_PROCESS)
