"""Text that models write themselves, and where trials use it."""

from __future__ import annotations

import torch
from models.architectures import inputs, make

from nbl_compiler.recoded_text import special_tokens
from nbl_compiler.trial_text import MOST_KINDS, Part, kinds_of_text
from nbl_compiler.written_text import PIECE, can_write, written


def rows(batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(3, 60, (batch, length), generator=generator)


def test_rows_have_the_shapes_and_openings_of_those_given():
    model = make("llama")
    given = [rows(3, 2 * PIECE + 10), rows(2, 20)]
    made = written(model, given)
    assert [r.shape for r in made] == [r.shape for r in given]
    assert all(torch.equal(new[:, 0], old[:, 0]) for new, old in zip(made, given, strict=True))
    bodies = torch.cat([r[:, 1:20] for r in made])
    assert len(bodies.unique(dim=0)) == 5  # no two rows are alike


def test_pieces_of_a_row_are_written_each_from_its_opening():
    """A model that counts from 5 to 54 and over: pieces begin anew behind the opening."""
    model = make("llama")
    size = model.config.vocab_size
    table = torch.full((size, size), -1e9)
    counting = torch.arange(5, 55)
    table[counting, counting.roll(-1)] = 0

    def forward(_module, _args, kwargs, output):
        output.logits = table[kwargs["input_ids"]][:, -output.logits.shape[1] :]
        return output

    model.register_forward_hook(forward, with_kwargs=True)
    (made,) = written(model, [torch.tensor([[5] + [0] * (PIECE + 3)])])
    body = [5 + i % 50 for i in range(1, PIECE)]
    assert made[0].tolist() == [5, *body, *body[:4]]


def test_what_is_written_depends_on_nothing_else_and_changes_nothing():
    model = make("llama")
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = written(model, [rows(2, 40)])[0]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(written(model, [rows(2, 40)])[0], first)


def test_special_tokens_are_not_written():
    model = make("llama")
    model.config.eos_token_id = list(range(model.config.vocab_size // 2))
    model.config.pad_token_id = None
    model.config.image_token_index = model.config.vocab_size - 1
    forbidden = set(special_tokens(model))
    assert forbidden >= {*range(model.config.vocab_size // 2), model.config.vocab_size - 1}
    (made,) = written(model, [rows(4, 64)])
    assert not forbidden & set(made[:, 1:].unique().tolist())


def test_what_authors_recommend_to_sample_with_does_not_matter():
    model = make("llama")
    expected = written(model, [rows(2, 40)])[0]
    for name, value in (("top_k", 1), ("temperature", 0.1), ("repetition_penalty", 3.0)):
        setattr(model.generation_config, name, value)
    assert torch.equal(written(model, [rows(2, 40)])[0], expected)


def test_decoders_are_tried_on_what_they_write_and_encoders_are_not():
    decoder = make("llama")
    batches = [inputs("llama", 4, 32), inputs("llama", 2, 24)]
    kinds = kinds_of_text(decoder, batches)
    assert len(kinds) == MOST_KINDS
    natural, own = kinds[0], kinds[-1]
    expected = written(decoder, [part.inputs["input_ids"] for part in natural])
    assert [shape(p) for p in own] == [shape(p) for p in natural]
    for part, ids in zip(own, expected, strict=True):
        assert torch.equal(part.inputs["input_ids"], ids)
    assert len(kinds_of_text(decoder, batches, other=False)) == MOST_KINDS - 1
    encoder = make("bert")
    assert not can_write(encoder)
    assert len(kinds_of_text(encoder, [inputs("bert", 4, 32)])) == MOST_KINDS - 1
    assert not can_write(make("t5"))


def shape(part: Part) -> torch.Size:
    return part.inputs["input_ids"].shape
