"""The result file: written after every point, gone on from, refused if it is of something else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench.results import Results


def test_a_second_run_measures_only_what_is_missing(tmp_path: Path) -> None:
    path, calls = tmp_path / "r.json", []

    def make(value: int) -> dict[str, int]:
        calls.append(value)
        return {"value": value}

    first = Results(path, {"seed": 0}, {"format": 1})
    assert first.row("a", lambda: make(1)) == {"value": 1}
    assert json.loads(path.read_text())["rows"] == {"a": {"value": 1}}
    second = Results(path, {"seed": 0})
    assert second.row("a", lambda: make(2)) == {"value": 1}
    assert second.row("b", lambda: make(3)) == {"value": 3}
    assert calls == [1, 3]
    assert json.loads(path.read_text())["format"] == 1


def test_rows_that_are_measured_together_come_together(tmp_path: Path) -> None:
    results = Results(tmp_path / "r.json", {})
    results.group(["a"], lambda: {"a": {"value": 1}})
    made = results.group(["a", "b"], lambda: {"a": {"value": 2}, "b": {"value": 3}})
    assert made == {"a": {"value": 2}, "b": {"value": 3}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"settings": {"seed": 1}, "rows": {}}', r"\{'seed': 1\}, not of \{'seed': 0\}; move"),
        ("[]", "holds no results"),
        ("{", "no JSON file"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(SystemExit, match=message):
        Results(path, {"seed": 0})
    assert path.read_text() == text
