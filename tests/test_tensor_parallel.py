"""Calibrating a model whose layers are spread over two processes, and the plan on the whole one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.processes import PROCESSES, calibrate_in_processes
from helpers.tiny import config, text
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import nbl_compiler as nbl
from nbl_compiler.calibration import Calibrated, observe_model
from nbl_compiler.errors import ConfigError

# Float32 rounding: of the model's own sums, which are taken in parts, times the condition of the
# fits.
MAP_TOLERANCE = 1e-3
NMSE_TOLERANCE = 1e-4
LAYERS = 2
WEIGHT_TOLERANCE = 1e-5  # what float32 leaves of weights that are read off the graph
pytestmark = pytest.mark.thorough  # loading transformers in two processes takes a minute
SCENARIOS = ("nan", "taps", "plan")  # a failure must not spoil what follows


def batches() -> list[Tensor]:
    return [text(8, 64, seed=seed) for seed in range(8)]


def both_kinds() -> nbl.Config:
    """Sites of both kinds, chosen by trials."""
    return nbl.Config(nbl.Attention(count=1, rank_by="loss"), nbl.FFN(count=1, keep=0.25))


def save(folder: Path) -> None:
    """Save a model with every bias there is, and a number of neurons that two do not share."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=25, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=2, attention_bias=True, mlp_bias=True,
            max_position_embeddings=128,
        )
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)


def load(folder: Path, **options: Any) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def calibrate(rank: int, scenario: str, folder: Path) -> nbl.Plan:
    from transformers.distributed import DistributedConfig

    model = load(folder, distributed_config=DistributedConfig(tp_plan="auto", tp_size=PROCESSES))
    given = batches()
    if scenario == "taps":
        return nbl.calibrate(model, given, config(count=1, taps=1), progress=False)
    if scenario == "nan":  # one token, whose row one of the processes takes
        with torch.no_grad():
            embedding = model.get_input_embeddings().weight.to_local()
            embedding[:1] = float("nan")
        only = torch.full_like(given[0], 63)
        only[0, -1] = 0
        return nbl.calibrate(model, [only], config(holdout=0.0, count=1), progress=False)
    calibrated = observe_model(model, given, both_kinds(), progress=False)
    torch.save(own_weights_of(calibrated), folder / f"own weights.{rank}")
    plan = calibrated.plan()
    options = {"plan": plan, "lowering": "eager"}
    with torch.no_grad(), pytest.raises(ConfigError, match="does not run a plan"):
        torch.compile(model, backend="nbl", options=options)(given[0], use_cache=False)
    return plan


def own_weights_of(calibrated: Calibrated) -> dict[str, tuple[Tensor, Tensor]]:
    """Return what each attention site's own weights make of values."""
    sites = calibrated.observation.sites.items()
    return {name: (site.own.value, site.own.output) for name, site in sites}


class Calibrate:
    """``calibrate`` of a folder's model, in a form that processes can be given."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, rank: int, scenario: str) -> nbl.Plan:
        return calibrate(rank, scenario, self.folder)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the model, and of what the processes left."""
    folder = tmp_path_factory.mktemp("tensor_parallel")
    save(folder)
    calibrate_in_processes(Calibrate(folder), SCENARIOS, folder)
    return folder


def test_the_plan_is_the_whole_model_s(results: Path) -> None:
    files = [results / f"plan.{rank}" for rank in range(PROCESSES)]
    assert files[0].read_bytes() == files[1].read_bytes()
    plan, model = nbl.Plan.load(files[0]), load(results)
    calibrated = observe_model(model, batches(), both_kinds(), progress=False)
    alone = calibrated.plan()
    assert {site.kind for site in plan.rewritten} == {"attention", "ffn"}
    for site, other in zip(plan.sites, alone.sites, strict=True):
        assert (site.name, site.decision, site.reason) == (other.name, other.decision, other.reason)
        assert site.nmse == pytest.approx(other.nmse, rel=NMSE_TOLERANCE)
        assert site.holdout_nmse == pytest.approx(other.holdout_nmse, rel=NMSE_TOLERANCE)
        if site.kind == "attention":
            assert site.cca_bound == pytest.approx(other.cca_bound, rel=NMSE_TOLERANCE)
        for fact in ("tokens", "parameters", "kept"):
            assert site.details.get(fact) == other.details.get(fact)
    for sketch, known in zip(plan.fingerprint, alone.fingerprint, strict=True):
        assert sketch.matches(known)
    own = torch.load(results / "own weights.0")
    for name, expected in own_weights_of(calibrated).items():
        for part, one in zip(own[name], expected, strict=True):
            torch.testing.assert_close(part, one, rtol=0, atol=WEIGHT_TOLERANCE)


def test_the_whole_model_runs_the_plan(results: Path) -> None:
    plan, model = nbl.Plan.load(results / "plan.0"), load(results)
    alone = nbl.calibrate(model, batches(), both_kinds(), progress=False)
    outputs = []
    for one in (plan, alone):
        options = {"plan": one, "lowering": "eager", "strict": True}
        compiled = torch.compile(model, backend="nbl", options=options)
        with torch.no_grad():
            outputs.append(compiled(batches()[0], use_cache=False).logits)
        torch._dynamo.reset()
    with torch.no_grad():
        dense = model(batches()[0], use_cache=False).logits
    scale = (dense - outputs[1]).abs().max()  # what the plan changes
    assert scale > 0
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=float(MAP_TOLERANCE * scale))


@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        ("nan", r"CalibrationError: (process \d failed: )?model.layers.0.self_attn: activations"),
        ("taps", r"ConfigError: model.layers.0.self_attn: a tensor-parallel model has the values"),
    ],
)
def test_what_ends_in_all_processes(results: Path, scenario: str, message: str) -> None:
    for rank in range(PROCESSES):
        told = (results / f"{scenario}.{rank}").read_text()
        assert re.match(message, told), told
