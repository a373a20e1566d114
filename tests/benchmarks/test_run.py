"""The whole benchmark on a tiny model: one file, gone on from, that the other commands can read."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import report
import run
from bench.profiles import Profile
from bench.speed_points import DENSE, Point
from helpers.rates import FixedRates

from nbl_compiler.bench_compare import FORMAT, compare

SMALL = Profile(
    quality={"tiny": [(("FLAP", "TARDIS, published"), (0.5,))]},
    embeddings=[],
    speed={"tiny": [Point("prefill", 16, repeats=2)]},
    timed=("dense eager", DENSE),
    tokens=512,
    eval_tokens=256,
)
ROWS = [
    "quality/tiny/FLAP 0.5",
    "quality/tiny/TARDIS, published 0.5",
    "speed/tiny/float32/prefill/16/batch 1/at 0.5/dense eager 0.5",
    "speed/tiny/float32/prefill/16/batch 1/at 0.5/dense inductor 0.5",
]


def test_a_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bench.json"
    monkeypatch.setitem(run.PROFILES, "tiny", SMALL)
    monkeypatch.setattr(run, "Probe", lambda *_, **__: FixedRates())
    monkeypatch.setattr(sys, "argv", ["run.py", "--profile", "tiny", "--out", str(path)])
    run.main()
    content = json.loads(path.read_text())
    assert content["format"] == FORMAT
    assert list(content["rows"]) == ROWS
    assert "plain FFNs only" in content["rows"][ROWS[1]]["skipped"]
    assert all(row["revision"] for row in content["rows"].values())
    assert content["settings"]["machine"]["cores"] >= 1

    monkeypatch.setattr(run, "decoder", None)  # nothing is left to measure, or even to load
    run.main()
    assert json.loads(path.read_text()) == content

    assert compare(path, path).regressions == ()
    made = report.parts(content)
    assert "| FLAP | published recipe, implemented here | 50% |" in made["quality"]
    assert "| dense eager |" in made["points"]
    assert "TARDIS, published" in made["skipped"]

    words = ["run.py", "--profile", "tiny", "--out", str(path), "--tokens", "1024"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match=r"\{'tokens': 512\}, not of \{'tokens': 1024\}"):
        run.main()
