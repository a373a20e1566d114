"""``nbl eval``: what is measured is what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.plans import random_plan
from helpers.saved_model import save_tiny_llama
from helpers.tiny import compiled, output, text, tiny
from hypothesis import given
from hypothesis import strategies as st
from models.architectures import BY_NAME, HIDDEN
from transformers import AutoModelForCausalLM, AutoTokenizer

import nbl_compiler as nbl
from nbl_compiler.errors import ConfigError
from nbl_compiler.evaluation.evaluate_plan import LEAST_DOCUMENTS, Evaluation, evaluate_plan
from nbl_compiler.evaluation.generation import compare_generation, repetition
from nbl_compiler.evaluation.perplexity import rows_of_documents
from nbl_compiler.evaluation.token_losses import token_losses

# Sums of float32 log-probabilities against torch's own loss.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, nbl.Plan]:
    folder = save_tiny_llama(tmp_path_factory.mktemp("tiny"))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    names = [f"model.layers.{i}.self_attn" for i in range(4)]
    plan = random_plan(model, names, [1, 3], 32)
    return model, AutoTokenizer.from_pretrained(folder), plan


DOCUMENTS = [f"Document {i} says {'so ' * i} much and no more than that." for i in range(12)]


def evaluated(saved: tuple[Any, Any, nbl.Plan], plan: nbl.Plan, **options: Any) -> Evaluation:
    model, tokenizer, _ = saved
    return evaluate_plan(model, tokenizer, plan, DOCUMENTS, **{"tokens": 600, **options})


def test_losses_are_those_of_torch() -> None:
    """Rows of more positions than are compared at once."""
    model, rows = tiny(), [text(1, 300, seed=s) for s in range(2)]
    plan = random_plan(model, BY_NAME["llama"].site_names(2), [1], HIDDEN)
    fast = compiled(model, plan=plan)
    found = token_losses(model, fast, rows, progress=False)
    for row, ids in enumerate(rows):
        p, q = (output(m, ids, use_cache=False)[0, :-1].log_softmax(-1) for m in (model, fast))
        for logs, losses in ((p, found.dense), (q, found.nbl)):
            expected = F.nll_loss(logs, ids[0, 1:], reduction="none").double()
            torch.testing.assert_close(losses[row], expected, rtol=0, atol=ROUNDING)
        divergence = F.kl_div(q, p, reduction="none", log_target=True).sum(-1).double()
        torch.testing.assert_close(found.divergence[row], divergence, rtol=0, atol=ROUNDING)
        assert torch.equal(found.agrees[row], (p.argmax(-1) == q.argmax(-1)).double())
    assert 0 < float(found.agrees.mean()) < 1


def test_an_empty_plan_costs_nothing(saved) -> None:
    found = evaluated(saved, nbl.Plan(), lengths=(32, 16), drop=True, prompts=3, new_tokens=6)
    assert [row.length for row in found.lengths] == [16, 32]
    for row in found.lengths:
        assert row.nbl == row.dense == pytest.approx(row.dropped)
        assert (row.ratio.low, row.ratio.value, row.ratio.high) == (1, 1, 1)
        assert (row.divergence.value, row.agreement.low) == (0, 1)
    assert found.generation is not None
    assert (found.generation.same, found.generation.parted) == (1, 6)


def test_the_parts_of_an_evaluation_agree(saved) -> None:
    plan = saved[2]
    found = evaluated(saved, plan, lengths=(64,), drop=True)
    (row,) = found.lengths
    assert row.ratio.value == pytest.approx(row.nbl / row.dense)
    assert row.ratio.low < row.ratio.value < row.ratio.high
    assert row.divergence.value > 0
    assert row.dropped not in (None, row.dense, row.nbl)
    spans = found.positions
    assert [span.first for span in spans] == [1, 17, 33]
    assert [span.last for span in spans] == [16, 32, 63]
    for name in ("dense", "nbl"):
        total = sum((s.last - s.first + 1) * getattr(s, name) for s in spans) / 63
        assert torch.tensor(total).exp().item() == pytest.approx(getattr(row, name), rel=1e-6)
    assert json.loads(json.dumps(found.as_json()))["lengths"][0]["ratio"]["value"] > 0


@pytest.mark.parametrize(("documents", "unit"), [(12, "documents"), (1, "rows")])
def test_intervals_are_drawn_over_documents_where_there_are_enough(saved, documents, unit) -> None:
    model, tokenizer, plan = saved
    texts = ["".join(DOCUMENTS)] if documents == 1 else DOCUMENTS
    found = evaluate_plan(model, tokenizer, plan, texts, tokens=600, lengths=(32,))
    count, name = found.lengths[0].units.split()
    assert name == unit
    assert int(count) >= LEAST_DOCUMENTS


@given(st.lists(st.text(alphabet="abcdefgh", min_size=1, max_size=30), min_size=1, max_size=8))
def test_a_row_knows_the_document_it_begins_in(documents: list[str]) -> None:
    class Letters:
        bos_token_id = 0

        def __call__(self, document: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [ord(letter) for letter in document]}

    owners = [i for i, document in enumerate(documents) for _ in document]
    letters = "".join(documents)
    if len(letters) < 4:
        return
    rows = rows_of_documents(documents, Letters(), tokens=10_000, length=5)
    for index, row in enumerate(rows):
        assert row.ids[0, 0] == 0
        assert bytes(row.ids[0, 1:].tolist()).decode() == letters[4 * index : 4 * index + 4]
        assert row.document == owners[4 * index]


@given(st.lists(st.integers(0, 3), max_size=40))
def test_repetition_counts_runs_that_occurred_before(tokens: list[int]) -> None:
    runs = [tokens[i : i + 4] for i in range(len(tokens) - 3)]
    again = sum(run in runs[:i] for i, run in enumerate(runs))
    assert repetition(tokens) == pytest.approx(again / len(runs) if runs else 0.0)


def test_texts_part_where_the_models_differ() -> None:
    model, other = tiny(), tiny(seed=1)
    prompts = text(3, 6)
    found = compare_generation(model, other, prompts, 5)

    def continued(network: Any) -> torch.Tensor:
        ids = prompts
        for _ in range(5):
            ids = torch.cat([ids, output(network, ids, use_cache=False)[:, -1:].argmax(-1)], 1)
        return ids[:, 6:]

    equal = (continued(model) == continued(other)).cummin(1).values.sum(1)
    assert found.parted == equal.double().quantile(0.5)
    assert found.same == (equal == 5).double().mean()


@pytest.mark.parametrize("lengths", [(), (1,), (512, 0)])
def test_lengths_that_predict_nothing(saved, lengths) -> None:
    with pytest.raises(ConfigError, match="must name context lengths of at least 2"):
        evaluated(saved, nbl.Plan(), lengths=lengths)


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of the harness whose data is a local file."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = [{"start": f"{i} and ", "ends": ["one", "two", "six"], "right": i % 3}
             for i in range(8)]  # fmt: skip
    data = folder / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    (folder / "endings.yaml").write_text(
        "task: nbl_endings\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        "output_type: multiple_choice\ntest_split: test\n"
        'doc_to_text: "{{start}}"\ndoc_to_choice: "{{ends}}"\ndoc_to_target: right\n'
        "metric_list:\n  - metric: acc\n"
    )
    return folder


def test_a_local_task_of_the_harness(saved, task_folder: Path) -> None:
    model, tokenizer, plan = saved
    options = {"lengths": (32,), "tasks": ["nbl_endings"], "task_folder": task_folder}
    same = evaluated(saved, nbl.Plan(), **options).tasks["nbl_endings"]["acc"]
    dense, ours = evaluated(saved, plan, **options).tasks["nbl_endings"]["acc"]
    assert same == (dense, dense)

    def right(network: Any, index: int) -> bool:
        """Score the endings by hand, as the harness says it does."""
        start = tokenizer(f"{index} and", add_special_tokens=True)["input_ids"]
        scores = []
        for end in ("one", "two", "six"):
            ids = tokenizer(f"{index} and {end}", return_tensors="pt")["input_ids"]
            logs = output(network, ids[:, :-1], use_cache=False).log_softmax(-1)[0]
            ending = ids[0, len(start) :]
            scores.append(float(logs[len(start) - 1 :].gather(1, ending[:, None]).sum()))
        return scores.index(max(scores)) == index % 3

    for network, accuracy in ((model, dense), (compiled(model, plan=plan), ours)):
        assert accuracy == sum(right(network, i) for i in range(8)) / 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["no such task"]}, "the harness knows no task no such task"),
        ({"tasks": ["x"], "task_folder": Path("/nowhere")}, "no folder of tasks at /nowhere"),
    ],
)
def test_tasks_that_do_not_exist(saved, options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluated(saved, nbl.Plan(), lengths=(32,), **options)
