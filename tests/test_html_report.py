"""The HTML report in a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.tiny import text, texts, tiny

import nbl_compiler as nbl

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def load(page: Path) -> tuple[str, list[str]]:
    """Return the page's document after loading, and its console messages."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("needs a browser: apt-get install chromium")
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        f"--user-data-dir={page.parent / 'profile'}", "--enable-logging=stderr", "--dump-dom",
        page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return done.stdout, re.findall(r"CONSOLE.*", done.stderr)


def test_a_console_error_would_be_seen(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text("<!doctype html><script>missing()</script>")
    _, messages = load(page)
    assert any("missing is not defined" in message for message in messages)


def test_the_report_loads_and_shows_the_sites(tmp_path: Path) -> None:
    model = tiny()
    config = nbl.Config(attention=nbl.Attention(count=1), ffn=nbl.FFN(count=1, keep=0.25))
    plan = nbl.calibrate(model, texts(), config, progress=False)
    report = nbl.explain(model, text(), use_cache=False)
    page = tmp_path / "report.html"
    report.save_html(page)
    assert "http" not in page.read_text().replace("http://www.w3.org", "")
    document, messages = load(page)
    assert messages == []
    for number, row in enumerate(report.rows):
        assert f'href="#site-{number}"' in document  # the strip
        assert document.count(f"<b>{row.site}</b>") == 1
    assert document.count('class="cell rewritten"') == 2
    assert document.count('class="cell left-dense"') == 2
    assert document.count("<p>after</p>") == 2  # a second drawing for each rewritten site
    assert document.count("</svg>") == 4 + 2 + 1  # before, after, the curve
    assert plan.digest[:16] in document
    assert "+linear" in document  # the code diff


def test_markup_in_names_is_escaped(tmp_path: Path) -> None:
    report = nbl.explain(tiny(), text(), plan=nbl.Plan(model="<script>alert(1)</script>"))
    page = tmp_path / "report.html"
    report.save_html(page)
    assert "<script>" not in page.read_text()
