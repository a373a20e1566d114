"""Running ``nbl`` in the test's own process."""

from __future__ import annotations

import sys

import pytest

from nbl_compiler import cli


def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object
) -> tuple[int, str, str]:
    """Run ``nbl …``; return (exit status, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["nbl", *map(str, words)])
    status = 0
    try:
        cli.main()
    except SystemExit as ended:
        status = int(ended.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err
