"""Text sources and packing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nbl_compiler.errors import ConfigError
from nbl_compiler.evaluation.perplexity import evaluation_rows
from nbl_compiler.text import TextSource, python_docs_parts, token_batches


class Bytes:
    """A tokenizer whose tokens are bytes, with 256 as BOS."""

    bos_token_id = 256

    def __call__(self, text, add_special_tokens=True, truncation=False):
        ids = list(text.encode())
        return {"input_ids": [256, *ids] if add_special_tokens else ids}


def test_python_docs_parts_share_no_document():
    calibration, held_out = python_docs_parts()
    assert calibration
    assert held_out
    assert not set(calibration) & set(held_out)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_local_files_through_datasets(tmp_path: Path, suffix: str):
    import datasets

    rows = datasets.Dataset.from_dict({"body": ["one", "", "two"]})
    path = tmp_path / f"text{suffix}"
    {".jsonl": rows.to_json, ".csv": rows.to_csv, ".parquet": rows.to_parquet}[suffix](str(path))
    assert list(TextSource(str(path), column="body").documents()) == ["one", "two"]


def test_a_missing_column_is_named(tmp_path: Path):
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"body": "one"}) + "\n")
    with pytest.raises(ConfigError, match="no column 'text'; it has body"):
        list(TextSource(str(path)).documents())


@given(
    st.lists(st.text(alphabet="ab", min_size=1, max_size=30), min_size=1, max_size=8),
    st.integers(4, 60),
    st.integers(2, 16),
    st.integers(1, 3),
)
def test_rows_are_pieces_of_the_documents(documents, tokens, length, batch):
    bos = Bytes.bos_token_id
    batches = token_batches(documents, Bytes(), tokens=tokens, length=length, batch=batch)
    assert all(len(rows) == batch for rows in batches[:-1])
    rows = torch.cat(batches)
    assert (rows[:, 0] == bos).all()
    assert rows.shape[1] == length or len(rows) == 1
    assert rows.numel() <= tokens
    pieces = [
        piece
        for row in rows.tolist()
        for piece in bytes(i if i != bos else 10 for i in row).split(b"\n")
    ]
    assert all(any(piece.decode() in document for document in documents) for piece in pieces)
    letters = "".join(documents)
    for letter in "ab":
        assert (rows == ord(letter)).sum() <= letters.count(letter)  # nothing is used twice


def test_long_documents_fill_rows_of_their_own():
    documents = ["abc", "ABCDEFGHIJKLMNOP", "def"]
    rows = torch.cat(token_batches(documents, Bytes(), tokens=100, length=8))
    text = [bytes(i for i in row if i != 256).decode() for row in rows.tolist()]
    assert text == ["ABCDEFG", "HIJKLMN", "abcOP"]


def test_packing_leaves_out_less_than_a_row():
    documents = ["abcdefghij" * 3] * 4
    rows = torch.cat(token_batches(documents, Bytes(), tokens=100, length=8, batch=3))
    assert rows.shape == (12, 8)  # 100 // 8 rows, all from text that is there


def test_a_bos_at_the_cut_is_not_doubled():
    rows = torch.cat(token_batches(["abc", "def", "ghi"], Bytes(), tokens=12, length=4))
    assert rows.tolist() == [[256, *map(ord, text)] for text in ("abc", "def", "ghi")]


def test_without_bos_rows_are_the_plain_stream():
    tokenizer = Bytes()
    tokenizer.bos_token_id = None
    rows = torch.cat(token_batches(["abcdefgh"], tokenizer, tokens=8, length=3))
    assert rows.numel() == 6


def test_evaluation_rows_open_with_bos_and_do_not_overlap():
    rows = evaluation_rows(["abcdefghij"], Bytes(), tokens=12, length=4)
    assert [r[0, 0].item() for r in rows] == [256] * 3
    assert bytes(torch.cat([r[0, 1:] for r in rows]).tolist()) == b"abcdefghi"


def test_too_little_text_to_evaluate():
    with pytest.raises(ConfigError, match="one row needs 512"):
        evaluation_rows(["short"], Bytes(), tokens=512)


def test_no_text_at_all():
    with pytest.raises(ConfigError, match="empty"):
        token_batches([], Bytes(), tokens=10)
