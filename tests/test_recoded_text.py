"""Recoded text, and what is fitted on it."""

from __future__ import annotations

import torch
from models.architectures import inputs, make

import nbl_compiler as nbl
from nbl_compiler.calibration import observe_model
from nbl_compiler.ffn.stages import NeuronStage
from nbl_compiler.recoded_text import (
    RECODED_TOKENS,
    Recoded,
    WithRecoded,
    can_be_edited,
    ordinary_tokens,
    recoded,
)
from nbl_compiler.trial_text import Part
from nbl_compiler.trial_text import recoded as recoded_part

# Float32, of values of order one.
ROUNDING = 1e-6


WORDS = torch.arange(1000, 9000)


def rows() -> torch.Tensor:
    return torch.randint(0, 200, (4, 512), generator=torch.Generator().manual_seed(0))


def test_recoding_replaces_the_most_frequent_tokens_consistently():
    ids = rows()
    changed = recoded(ids, WORDS)
    assert torch.equal(changed[:, 0], ids[:, 0])
    assert torch.equal(changed, recoded(ids, WORDS))
    codes = []
    for old, new in zip(ids[:, 1:].tolist(), changed[:, 1:].tolist(), strict=True):
        code = dict(zip(old, new, strict=True))
        assert [code[token] for token in old] == new  # the same token is always replaced alike
        replaced = {token for token in code if code[token] != token}
        assert len(replaced) == len({code[token] for token in replaced}) == RECODED_TOKENS
        least = min(old.count(token) for token in replaced)
        assert all(old.count(token) <= least for token in code if token not in replaced)
        assert all(code[token] in WORDS for token in replaced)
        codes.append({code[token] for token in replaced})
    assert codes[0] != codes[1]
    other = recoded(ids.flip(0), WORDS)
    assert not torch.equal(other.flip(0), changed)  # no two texts share their conventions


def test_tokens_that_open_close_or_fill_rows_stand_for_no_others():
    model = make("llama")
    model.config.eos_token_id, model.config.pad_token_id = [2, 3, 10**6], -1
    tokens = ordinary_tokens(model, rows())
    missing = set(range(model.config.vocab_size)) - set(tokens.tolist())
    assert missing == {model.config.bos_token_id, 2, 3}
    assert torch.equal(ordinary_tokens(torch.nn.Linear(2, 2), rows()), rows().unique())


def test_trials_take_the_rows_recoded():
    model, ids = make("llama"), rows()
    part = Part({"input_ids": ids, "use_cache": False}, lambda count: torch.arange(count))
    edited = recoded_part(model, part)
    expected = recoded(ids, ordinary_tokens(model, ids))
    assert torch.equal(edited.inputs["input_ids"], expected)
    assert edited.keep(2048).tolist() == list(range(2048))


def test_padded_and_short_rows_are_not_edited():
    ids = torch.arange(32).view(1, 32)
    mask = torch.ones_like(ids)
    batch = {"input_ids": ids, "attention_mask": mask}
    assert can_be_edited(batch)
    mask[0, 0] = 0
    assert not can_be_edited(batch)
    assert Recoded(batch).inputs(make("llama"), batch) is None
    assert not can_be_edited({"input_ids": ids[:, :8]})


def test_every_second_batch_is_followed_by_itself_recoded():
    batches = [torch.full((1, 32), number) for number in range(3)]
    text = WithRecoded(batches)
    passages = list(text)
    assert text.length == len(passages) == 5
    recoded_ones = [p.batch for p in passages if isinstance(p, Recoded)]
    assert recoded_ones == [batches[0], batches[2]]
    assert [p for p in passages if not isinstance(p, Recoded)] == batches
    assert WithRecoded(iter(batches)).length is None


def test_maps_of_mixed_values_see_recoded_text_and_ffns_do_not():
    model = make("llama")
    batches = [inputs("llama", 2, 64, seed=s)["input_ids"] for s in range(3)]
    fold = nbl.FFN(keep=0.5)
    both = nbl.Config(nbl.Attention(mixed=True), fold)
    seen, without = (
        observe_model(model, batches, config, progress=False, solve=False).observation
        for config in (both, nbl.Config(None, fold))
    )
    tokens = ordinary_tokens(model, batches[0])
    again = [recoded(batches[number], tokens) for number in (0, 2)]
    with torch.no_grad():
        embedded = model.model.embed_tokens(torch.cat([*batches, *again]))
        expected = model.model.layers[0].input_layernorm(embedded).flatten(0, 1).double()
    count, width = expected.shape
    site = seen.sites["model.layers.0.self_attn"]
    assert site.train.count + site.holdout.count == count
    total = sum(part.mean_x[:width] * part.count for part in (site.train, site.holdout))
    torch.testing.assert_close(total, expected.sum(0), rtol=0, atol=ROUNDING * count)
    assert (expected[: 3 * 2 * 64].sum(0) - total).abs().max() > 1e3 * ROUNDING * count
    assert seen.ffn is not None
    assert without.ffn is not None
    for name, stage in seen.ffn.stages.items():
        other = without.ffn.stages[name]
        assert isinstance(stage, NeuronStage)
        assert isinstance(other, NeuronStage)
        assert stage.moments.count == other.moments.count
        torch.testing.assert_close(stage.energy, other.energy, rtol=ROUNDING, atol=0)


def test_maps_of_x_alone_see_text_as_it_is():
    model = make("llama")
    batches = [inputs("llama", 2, 64, seed=s)["input_ids"] for s in range(2)]
    plan = nbl.calibrate(model, batches, nbl.Config(nbl.Attention(count=1)), progress=False)
    assert [site.details["tokens"] for site in plan.sites] == [2 * 2 * 64] * len(plan.sites)
