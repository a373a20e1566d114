"""Tables and pages from a result file; what is checked in says what its JSON says."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import report
from bench import markers, plots, tables
from bench.headline import headline

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs/bench/results.json"


def exact(value: float, better: str = "lower") -> dict[str, Any]:
    return {"value": value, "low": value, "high": value, "better": better}


def quality_row(contender: str, family: str, ratio: float, fraction: float = 0.5) -> dict[str, Any]:
    return {
        "kind": "quality", "model": "small", "contender": contender, "family": family,
        "origin": "here", "fraction": fraction, "calibration_seconds": 3.0,
        "weight_bytes_per_token": 10, "resident_bytes": 10, "tokens": 1000,
        "perplexity": 20 * ratio,
        "dense_perplexity": 20.0, "interval": [ratio - 0.1, ratio + 0.1], "kl": 0.25, "top1": 0.5,
        "revision": "0123456789abcdef",
        "ratios": {"perplexity": exact(ratio), "weight bytes": exact(0.75)},
    }  # fmt: skip


def speed_row(contender: str, family: str, context: int, faster: float) -> dict[str, Any]:
    return {
        "kind": "speed", "model": "shape", "dtype": "float32", "phase": "decode",
        "context": context, "batch": 1, "at": 0.5, "fraction": 0.5,
        "contender": contender, "family": family, "origin": "here", "seconds": [0.1],
        "median_seconds": 0.1, "spread": 0.05,
        "tokens_per_second": 10.0, "ms_per_token": 100.0, "compile_seconds": 12.0,
        "calibration_seconds": 0.0, "resident_bytes": 2e6, "kv_bytes": 1e6, "peak_bytes": 4e6,
        "bytes_per_token": 5e5, "flops_per_token": 1e6, "predicted_seconds": 0.05, "reached": 0.5,
        "predicted_speedup": 2.5, "speedup_reached": 0.8, "revision": "fedcba9876543210",
        "rates": {"bytes_per_second": 1e9, "flops_per_second": 1e10,
                  "streamed_bytes_per_second": 2e9},
        "ratios": {"speed-up": exact(faster, "higher")},
    }  # fmt: skip


def content() -> dict[str, Any]:
    """Return a small result file's content."""
    rows = [
        quality_row("NBL", "attention", 1.25),
        quality_row("Wanda", "ffn", 1.5),
        {**quality_row("int8", "weights", 1.0), "skipped": "torchao is not installed"},
        *(speed_row("dense inductor", "dense", n, 1.0) for n in (128, 512)),
        *(speed_row("NBL", "attention", n, 2.0 + n / 1024) for n in (128, 512)),
    ]
    settings = {
        "text": "a.txt", "eval_text": "b.txt", "tokens": 8192, "eval_tokens": 2048, "seed": 0,
        "machine": {"cpu": "A CPU", "cores": 2, "threads": 2, "memory_bytes": 2**34,
                    "system": "Linux"},
        "versions": {"torch": "2.13.0"},
    }  # fmt: skip
    return {"format": 1, "settings": settings, "rows": {str(i): r for i, r in enumerate(rows)}}


def rows() -> list[dict[str, Any]]:
    return list(content()["rows"].values())


def test_marked_parts_are_replaced_and_the_rest_stays() -> None:
    page = "a\n<!-- bench:one -->\nold\n<!-- /bench:one -->\nb"
    filled = markers.fill(page, {"one": "new"})
    assert filled == "a\n<!-- bench:one -->\n\nnew\n\n<!-- /bench:one -->\nb"
    assert markers.fill(filled, {"one": "new"}) == filled
    assert markers.names(page) == ["one"]
    with pytest.raises(KeyError, match="one"):
        markers.fill(page, {})


def test_tables_say_what_the_rows_say() -> None:
    assert (
        "| NBL | here | 50% | 1.250 [1.150, 1.350] | 0.250 | 50.0% | 0.75 | 3 s |"
        in tables.quality(rows()).splitlines()
    )
    speed = tables.speed(rows()).splitlines()
    assert "| decode | 512 | 1 | 50% | 1.00× (2.50×) | 2.50× (2.50×) |" in speed
    assert "| int8 | small | torchao is not installed |" in tables.skipped(rows())
    assert "int8" not in tables.quality(rows())
    about = tables.provenance(content())
    assert "A CPU, 2 cores, 2 threads, 16 GiB" in about
    assert "Revision: 0123456789ab, fedcba987654" in about


def test_every_figure_of_a_point_is_shown() -> None:
    shown = tables.points(rows())
    assert "### shape, float32, decode, 512 tokens, batch 1, 50% replaced" in shown
    line = (
        "| NBL | 10.0 | 100.000 | 5% | 2.50× (2.50×) | 50.0 | 50% | 80% | 0.5 | 2.0 | 4.0 | 1.0 | "
        "12.0 | 0.0 |"
    )
    assert line in shown


def test_the_headline() -> None:
    made = headline(rows())
    assert "| shape, decode, 512 tokens | 2.50× |" in made
    assert "| NBL | 1.25 |" in made
    assert "| Wanda | 1.50 |" in made
    assert headline([]) == ""


def test_pictures_are_drawn_of_what_there_is(tmp_path: Path) -> None:
    made = plots.draw(rows(), tmp_path)
    assert sorted(made) == ["context.svg", "loss_bytes.svg", "roofline.svg"]  # no model has both
    first = (tmp_path / "context.svg").read_bytes()
    plots.draw(rows(), tmp_path)
    assert (tmp_path / "context.svg").read_bytes() == first
    assert plots.draw([], tmp_path / "none") == {}
    both = [*rows(), {**speed_row("NBL", "attention", 512, 2.0), "model": "small"}]
    assert "loss_speed.svg" in plots.draw(both, tmp_path)


def test_the_script_fills_a_copy_of_the_documentation(tmp_path: Path, monkeypatch) -> None:
    for page in report.PAGES:
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / page, tmp_path / page)
    (tmp_path / "r.json").write_text(json.dumps(content()))
    words = ["report.py", str(tmp_path / "r.json"), "--root", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    report.main()
    assert "| shape, decode, 512 tokens | 2.50× |" in (tmp_path / "README.md").read_text()
    page = (tmp_path / "docs/bench.md").read_text()
    assert "![context](bench/context.svg)" in page
    assert "A CPU" in page


def test_the_documentation_says_what_its_results_say() -> None:
    """Made anew by: python benchmarks/report.py docs/bench/results.json"""
    made = json.loads(RESULTS.read_text())
    for page, text in report.filled(made, ROOT, RESULTS.parent).items():
        assert page.read_text() == text, f"{page} has drifted from {RESULTS}"


def test_a_contender_that_replaces_more_says_so() -> None:
    more = {**speed_row("guarded", "ffn", 512, 1.5), "fraction": 0.8}
    assert "| guarded (80%) |" in tables.speed([*rows(), more])
    assert "| guarded (80%) |" in headline([*rows(), more])
