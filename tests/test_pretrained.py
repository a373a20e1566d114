"""Real pretrained models from installed packages, calibrated and run, some through Inductor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers.ffn_surgery import LAYOUTS, fold_by_surgery
from helpers.surgery import linearize_by_surgery
from torch import Tensor, nn

import nbl_compiler as nbl
from nbl_compiler.evaluation.dropping import dropping
from nbl_compiler.evaluation.perplexity import evaluation_rows, perplexity_of
from nbl_compiler.generate import greedy
from nbl_compiler.models import GEMMA, MINILM, load_causal, resolve
from nbl_compiler.text import python_docs_parts, token_batches

pytestmark = [pytest.mark.pretrained, pytest.mark.xdist_group("pretrained")]

# float32, 18 layers, logits of order 10: rounding of two orders of summation
LOGIT_ROUNDING = 2e-3
PROMPT = "The standard library of Python offers"
STEPS = 32


@dataclass
class Calibrated:
    model: Any
    tokenizer: Any
    plan: nbl.Plan
    surgery: nn.Module
    prompt: Tensor


def calibrated(
    model: Any, tokenizer: Any, attention: nbl.Attention, tokens: int = 4096
) -> Calibrated:
    batches = token_batches(python_docs_parts()[0], tokenizer, tokens=tokens)
    plan = nbl.calibrate(model, batches, nbl.Config(attention=attention), progress=False)
    prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    return Calibrated(model, tokenizer, plan, linearize_by_surgery(model, plan), prompt)


@pytest.fixture(scope="module")
def gemma() -> Calibrated:
    return calibrated(*load_causal(GEMMA), nbl.Attention(count=4), tokens=2048)


def gemma_of(*layers: int) -> tuple[Any, Any]:
    """Return Gemma with these layers only, and its tokenizer: compiling takes a time for each.

    The model says little of worth then, but computes with a real model's weights.
    """
    model, tokenizer = load_causal(GEMMA)
    model.model.layers = nn.ModuleList(model.model.layers[i] for i in layers)
    for place, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = place
    model.config.num_hidden_layers = len(layers)
    model.config.layer_types = [model.config.layer_types[i] for i in layers]
    return model, tokenizer


def compiled(case: Calibrated, lowering: str = "eager") -> Any:
    options: dict[str, Any] = {"plan": case.plan, "lowering": lowering, "strict": True}
    return torch.compile(case.model, backend="nbl", options=options)


def expected_tokens(case: Calibrated, steps: int = STEPS) -> tuple[Tensor, Tensor]:
    """Return greedy tokens of the surgery model and the logits that chose them, uncached."""
    ids = case.prompt
    with torch.no_grad():
        for _ in range(steps):
            logits = case.surgery(ids, use_cache=False, logits_to_keep=1).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        logits = case.surgery(ids, use_cache=False).logits
    length = case.prompt.shape[1]
    return ids[:, length:], logits[:, length - 1 : -1]


def decoded(fast: Any, prompt: Tensor, cache: Any, steps: int = STEPS) -> tuple[Tensor, Tensor]:
    """Return greedy tokens of a compiled model, and the logits that chose them."""
    seen: list[Tensor] = []

    def forward(**inputs: Any) -> Any:
        output = fast(**inputs)
        seen.append(output.logits[:, -1:])
        return output

    return greedy(forward, prompt, cache, steps), torch.cat(seen, 1)


def test_some_of_gemmas_layers_decode_like_surgery_with_every_cache():
    from transformers import DynamicCache, StaticCache

    model, tokenizer = gemma_of(0, 4, 5)  # the last one attends to everything
    case = calibrated(model, tokenizer, nbl.Attention(layers=(1, 2)))
    tokens, logits = expected_tokens(case)
    length = case.prompt.shape[1] + STEPS
    caches = {
        "dynamic": DynamicCache(config=model.config),
        "static": StaticCache(config=model.config, max_cache_len=length),
        "nbl dynamic": nbl.cache(model, case.plan, implementation="dynamic"),
        "nbl static": nbl.cache(model, case.plan, length),
    }
    for name, cache in caches.items():
        torch._dynamo.reset()  # four kinds of cache would exhaust Dynamo's recompile limit
        made, ours = decoded(compiled(case), case.prompt, cache)
        assert torch.equal(made, tokens), name
        torch.testing.assert_close(ours, logits, atol=LOGIT_ROUNDING, rtol=LOGIT_ROUNDING)
    saved = 1 - nbl.cache_bytes(caches["nbl static"]) / nbl.cache_bytes(caches["static"])
    assert saved == pytest.approx(2 / 3)  # at this length every layer's cache has the same size


@pytest.mark.thorough  # some of its layers are compiled every day
def test_gemma_through_inductor(gemma):
    """Prefill and greedy decoding with the plan's own cache."""
    tokens, logits = expected_tokens(gemma)
    cache = nbl.cache(gemma.model, gemma.plan, gemma.prompt.shape[1] + STEPS)
    made, ours = decoded(compiled(gemma, "inductor"), gemma.prompt, cache)
    assert torch.equal(made, tokens)
    torch.testing.assert_close(ours, logits, atol=LOGIT_ROUNDING, rtol=LOGIT_ROUNDING)


def test_a_linear_map_is_better_than_nothing(gemma):
    held_out = python_docs_parts()[1]
    rows = evaluation_rows(held_out, gemma.tokenizer, tokens=512)
    assert len(rows) == 1
    dense, ours, dropped = (
        perplexity_of(gemma.model, gemma.tokenizer, plan, held_out, 512)
        for plan in (nbl.Plan(), gemma.plan, dropping(gemma.plan))
    )
    assert dense < ours < dropped


def test_minilm_embeddings_stay_close():
    from transformers import AutoModel, AutoTokenizer

    folder = resolve(MINILM)
    model = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    calibration, held_out = python_docs_parts()
    batches = token_batches(calibration, tokenizer, tokens=8192, length=128, batch=16)
    config = nbl.Config(attention=nbl.Attention(count=2))
    plan = nbl.calibrate(model, batches, config, progress=False)
    sentences = [line for document in held_out for line in document.split("\n\n")][:24]
    given = tokenizer(sentences, padding=True, truncation=True, max_length=128, return_tensors="pt")
    fast = torch.compile(model, backend="nbl", options={"lowering": "eager", "strict": True})
    surgery = linearize_by_surgery(model, plan)
    with torch.no_grad():
        dense, ours, oracle = (m(**given).last_hidden_state for m in (model, fast, surgery))
    mask = given["attention_mask"][..., None]
    torch.testing.assert_close(ours * mask, oracle * mask, atol=LOGIT_ROUNDING, rtol=LOGIT_ROUNDING)

    def embed(hidden: Tensor) -> Tensor:
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    cosine = (embed(dense) * embed(ours)).sum(-1).mean().item()
    assert cosine > 0.9


def test_some_of_gemmas_layers_with_everything_through_inductor():
    """Value states in a sliding layer and in one that attends to everything; a static set in one
    FFN, a guard in another: one plan."""
    model, tokenizer = gemma_of(4, 5)
    batches = list(token_batches(python_docs_parts()[0], tokenizer, tokens=2048))
    states = nbl.Attention(layers=(0, 1), mixed=True)
    parts = [
        nbl.Config(attention=states, ffn=nbl.FFN(layers=(1,), keep=0.5)),
        nbl.Config(attention=None, ffn=nbl.FFN(layers=(0,), keep=0.1, guard="predicted")),
    ]
    first, second = (nbl.calibrate(model, batches, part, progress=False) for part in parts)
    (guarded,) = second.rewritten
    sites = tuple(guarded if site.name == guarded.name else site for site in first.sites)
    plan = nbl.Plan(sites, first.fingerprint, first.model)
    forms = [site.details.get("form", site.kind) for site in plan.rewritten]
    assert sorted(forms) == ["attention", "attention", "guarded", "keep+fold"]
    assert all("gates" in s.tensors for s in plan.rewritten if s.kind == "attention")
    prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    surgery = fold_by_surgery(model, plan, LAYOUTS["gemma3"])
    case = Calibrated(model, tokenizer, plan, surgery, prompt)
    steps = 6  # the oracle takes one token after the other
    tokens, logits = expected_tokens(case, steps)
    cache = nbl.cache(model, plan, prompt.shape[1] + steps)
    made, ours = decoded(compiled(case, "inductor"), prompt, cache, steps)
    assert torch.equal(made, tokens)
    with torch.no_grad():
        dense = model(torch.cat([prompt, tokens], 1), use_cache=False).logits
    dense = dense[:, prompt.shape[1] - 1 : -1]
    torch.testing.assert_close(ours, logits, atol=LOGIT_ROUNDING, rtol=LOGIT_ROUNDING)
    assert (ours - dense).abs().max() > 100 * LOGIT_ROUNDING  # the plan's maps do matter


@pytest.mark.parametrize(
    ("form", "lowering", "least"),
    [
        pytest.param({"keep": 0.5}, "eager", 0.9, marks=pytest.mark.thorough),
        ({"keep": 0.1, "guard": "predicted", "capacity": 0.2}, "inductor", 0.9),
        ({"keep": 0.0, "guard": "exact", "coverage": 0.8}, "eager", 0.8),
    ],
)
def test_minilm_with_every_ffn_folded(form: dict[str, Any], lowering: str, least: float):
    from transformers import AutoModel, AutoTokenizer

    folder = resolve(MINILM)
    model = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    calibration, held_out = python_docs_parts()
    if lowering == "inductor":  # compiling takes a time for each layer
        model.encoder.layer = model.encoder.layer[:3]
    count = len(model.encoder.layer)
    batches = list(token_batches(calibration, tokenizer, tokens=2048, length=128, batch=16))
    config = nbl.Config(attention=None, ffn=nbl.FFN(count=count, **form))
    plan = nbl.calibrate(model, batches, config, progress=False)
    assert len(plan.rewritten) == count
    sentences = [line for document in held_out for line in document.split("\n\n")][:4]
    given = tokenizer(sentences, padding=True, truncation=True, max_length=32, return_tensors="pt")
    options = {"lowering": lowering, "strict": True}
    fast = torch.compile(model, backend="nbl", options=options)
    surgery = fold_by_surgery(model, plan, LAYOUTS["bert"])
    with torch.no_grad():
        dense, ours, oracle = (m(**given).last_hidden_state for m in (model, fast, surgery))
    mask = given["attention_mask"][..., None]
    torch.testing.assert_close(ours * mask, oracle * mask, atol=LOGIT_ROUNDING, rtol=LOGIT_ROUNDING)
    cosine = nn.functional.cosine_similarity((dense * mask).sum(1), (ours * mask).sum(1))
    assert least < cosine.mean().item() < 1 - 1e-6
