"""``nbl bench compare``: what counts as a change, what is refused, the exit status."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import call

from nbl_compiler.bench_compare import Ratio, compare, verdict
from nbl_compiler.errors import ConfigError

POINT = "speed/shape/float32/decode/512/batch 1/NBL 0.5"
QUALITY = "quality/model/NBL 0.25"


def ratio(value: float, spread: float = 0.0, better: str = "higher") -> dict[str, Any]:
    return {"value": value, "low": value - spread, "high": value + spread, "better": better}


def content() -> dict[str, Any]:
    """Return the content of a result file with one point of speed and one of quality."""
    return {
        "format": 1,
        "settings": {
            "text": "a.txt", "eval_text": "b.txt", "tokens": 100, "eval_tokens": 50, "seed": 0,
            "machine": {"cpu": "one", "cores": 2}, "versions": {"torch": "2.13.0"},
        },
        "rows": {
            POINT: {"kind": "speed", "seconds": [1.0], "ratios": {"speed-up": ratio(2.0, 0.1)}},
            QUALITY: {
                "kind": "quality", "perplexity": 10.0,
                "ratios": {"perplexity": ratio(1.1, better="lower")},
            },
        },
    }  # fmt: skip


@pytest.fixture
def files(tmp_path: Path):
    """Return a function that writes two result files, the second changed by a function."""

    def write(change=lambda it: None) -> tuple[Path, Path]:
        paths = tmp_path / "a.json", tmp_path / "b.json"
        other = copy.deepcopy(content())
        change(other)
        for path, made in zip(paths, (content(), other), strict=True):
            path.write_text(json.dumps(made))
        return paths

    return write


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((2.0, 1.9, 2.1, "higher"), (2.4, 2.3, 2.5, "higher"), "better"),
        ((2.0, 1.9, 2.1, "higher"), (1.6, 1.5, 1.7, "higher"), "worse"),
        ((2.0, 1.9, 2.1, "higher"), (2.4, 2.05, 2.5, "higher"), "same"),  # the rounds overlap
        ((2.0, 2.0, 2.0, "higher"), (1.97, 1.97, 1.97, "higher"), "same"),  # within 2 %
        ((1.1, 1.1, 1.1, "lower"), (1.2, 1.2, 1.2, "lower"), "worse"),
        ((1.1, 1.1, 1.1, "lower"), (1.0, 1.0, 1.0, "lower"), "better"),
    ],
)
def test_what_counts_as_a_change(before, after, expected) -> None:
    assert verdict(Ratio(*before), Ratio(*after)) == expected


def test_equal_files_have_no_regression(files) -> None:
    found = compare(*files())
    assert [c.verdict for c in found.changes] == ["same", "same"]
    assert found.regressions == ()
    assert found.notes == ()


def test_absolute_times_do_not_count(files) -> None:
    def slower(it) -> None:
        it["rows"][POINT]["seconds"] = [100.0]
        it["rows"][QUALITY]["perplexity"] = 99.0
        it["settings"]["machine"]["cpu"] = "another"

    found = compare(*files(slower))
    assert found.regressions == ()
    assert found.notes == ("machine: cpu one → another",)


def test_a_contender_that_cannot_take_part_any_more_is_a_regression(files) -> None:
    def gone(it) -> None:
        it["rows"][POINT] = {"kind": "speed", "skipped": "it raised"}

    (change,) = compare(*files(gone)).regressions
    assert (change.verdict, change.reason) == ("gone", "it raised")


def test_points_of_one_file_alone_are_told(files) -> None:
    found = compare(*files(lambda it: it["rows"].pop(POINT)))
    assert [c.row for c in found.changes] == [QUALITY]
    assert found.notes == ("1 rows are in the first file alone",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda it: it.update(rows={}), "no point in common"),
        (lambda it: it.update(format=2), "has format 2, this release reads 1"),
        (lambda it: it.pop("settings"), "holds no results"),
        (lambda it: it["settings"].update(eval_text="c.txt"), "eval_text='b.txt'.*same text"),
        (lambda it: [row.update(ratios={}) for row in it["rows"].values()], "no ratio in common"),
    ],
)
def test_files_that_do_not_fit_together(files, change, message) -> None:
    with pytest.raises(ConfigError, match=message):
        compare(*files(change))


def test_no_json(files) -> None:
    first, second = files()
    second.write_text("{")
    with pytest.raises(ConfigError, match=r"b\.json is no JSON file"):
        compare(first, second)


def test_the_command(monkeypatch, capsys, files, tmp_path) -> None:
    def worse(it) -> None:
        it["rows"][POINT]["ratios"]["speed-up"] = ratio(1.5, 0.1)

    assert call(monkeypatch, capsys, "bench", "compare", *files())[0] == 0
    status, out, _ = call(monkeypatch, capsys, "bench", "compare", *files(worse))
    assert status == 1
    assert "1 worse" in out
    assert "-25.0%" in out
    status, out, _ = call(monkeypatch, capsys, "bench", "compare", *files(worse), "--json")
    assert status == 1
    assert [c["verdict"] for c in json.loads(out)["changes"]] == ["worse", "same"]
    assert (
        call(monkeypatch, capsys, "bench", "compare", *files(worse), "--tolerance", "30%")[0] == 0
    )
    status, _, err = call(
        monkeypatch, capsys, "bench", "compare", tmp_path / "a.json", tmp_path / "none.json"
    )
    assert status == 1
    assert "none.json" in err
