"""The suite itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TESTS = """
import os
import pytest

NUMBERS = [pytest.param(n, marks=pytest.mark.xdist_group(f"group {n % 2}")) for n in range(8)]

@pytest.mark.parametrize("n", NUMBERS)
def test_number(n):
    with open("ran.txt", "a") as file:
        file.write(f"{n % 2} {os.environ['PYTEST_XDIST_WORKER']}\\n")
"""


def test_groups_stay_together(tmp_path: Path) -> None:
    """A scenario is computed once for all tests of its group, which halves the time of the suite.

    pytest 9.2 and pytest-xdist 3.8 scatter them over the workers, and say nothing.
    """
    (tmp_path / "test_numbers.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadgroup"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    ran = [line.split() for line in (tmp_path / "ran.txt").read_text().splitlines()]
    assert len(ran) == 8
    assert len({tuple(line) for line in ran}) == 2  # each group has one worker
