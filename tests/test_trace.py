"""``TORCH_LOGS`` and ``TORCH_TRACE``."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.plans import random_plan
from helpers.tiny import compiled, output, text, tiny
from models.architectures import BY_NAME, HIDDEN

import nbl_compiler as nbl

SCRIPT = """
import torch, nbl_compiler
layer = torch.nn.Linear(4, 4).eval()
with torch.no_grad():
    torch.compile(layer, backend="nbl", options={"plan": nbl_compiler.Plan(), "lowering": "eager"})(
        torch.ones(2, 4)
    )
"""


def plan_for(model: object) -> nbl.Plan:
    return random_plan(model, BY_NAME["llama"].site_names(2), [1], HIDDEN)  # type: ignore[arg-type]


@contextmanager
def listening(level: int) -> Iterator[list[logging.LogRecord]]:
    """Collect what the package logs at a level and above."""
    records: list[logging.LogRecord] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    logger, listener = logging.getLogger("nbl_compiler"), Listener()
    before = logger.level
    logger.addHandler(listener)
    logger.setLevel(level)
    try:
        yield records
    finally:
        logger.setLevel(before)
        logger.removeHandler(listener)


def test_the_log_says_what_happened_to_every_graph() -> None:
    model = tiny()
    plan = plan_for(model)
    with listening(logging.DEBUG) as records:
        output(compiled(model, plan=plan), text())
    lines = [r.getMessage() for r in records if r.name == "nbl_compiler.trace"]
    assert f"plan {plan.digest[:16]}; 4 sites match, 1 are rewritten" in lines[0]
    assert "  rewritten model.layers.1.self_attn" in lines
    (left,) = [line for line in lines if "left alone model.layers.0.self_attn" in line]
    assert "left dense by the test" in left
    assert "modeling_llama.py" in left or "sdpa_attention.py" in left
    assert "graph after the passes" in lines[-1]


def test_the_log_is_silent_by_default() -> None:
    with listening(logging.WARNING) as records:
        output(compiled(tiny(), plan=nbl.Plan()), text())
    assert records == []


def run(**variables: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
    )
    return done.stderr


@pytest.mark.thorough  # two processes of their own
def test_torch_logs_knows_the_package() -> None:
    assert "no plan" not in run()
    told = run(TORCH_LOGS="nbl_compiler")
    assert "0 sites match, 0 are rewritten" in told
    assert "graph after the passes" not in told


def test_torch_trace_gets_artifacts(tmp_path: Path) -> None:
    run(TORCH_TRACE=str(tmp_path))
    (file,) = tmp_path.iterdir()
    artifacts = {}
    lines = file.read_text().splitlines()
    for number, line in enumerate(lines):
        if line.startswith("\t") or "{" not in line:  # a payload
            continue
        record = json.loads(line[line.index("{") :])
        if "artifact" in record:
            body = []
            for following in lines[number + 1 :]:
                if not following.startswith("\t"):
                    break
                body.append(following[1:])
            artifacts[record["artifact"]["name"]] = "\n".join(body)
    assert json.loads(artifacts["nbl_passes"])["passes"] == []
    assert "linear" in artifacts["nbl_graph_after_passes"]
