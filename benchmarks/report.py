"""Tables and pictures of a result file, into the documentation.

    python benchmarks/report.py docs/bench/results.json

Fills the marked parts of the README and of ``docs/bench.md``, and draws the pictures beside the
result file. With another root it does so for a copy of the documentation.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import markers, plots, tables
from bench.headline import headline

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/bench.md", "docs/bench/points.md")


def parts(content: Mapping[str, Any]) -> dict[str, str]:
    """Return name → Markdown of every generated part but the pictures."""
    rows = list(content["rows"].values())
    return {
        "headline": headline(rows),
        "provenance": tables.provenance(content),
        "quality": tables.quality(rows),
        "embeddings": tables.embeddings(rows),
        "speed": tables.speed(rows),
        "growth": tables.growth(rows),
        "skipped": tables.skipped(rows),
        "points": tables.points(rows),
    }


def pictures(folder: Path, page: Path) -> str:
    """Return links to the pictures that there are, as the page has to write them."""
    names = sorted(path.name for path in folder.glob("*.svg"))
    place = folder.relative_to(page.parent)
    return "\n\n".join(f"![{name.removesuffix('.svg')}]({place / name})" for name in names)


def filled(content: Mapping[str, Any], root: Path, folder: Path) -> dict[Path, str]:
    """Return page → what it should say.

    Args:
        content: Of a result file.
        root: Of the documentation.
        folder: Where the pictures are.
    """
    made = parts(content)
    pages = {}
    for name in PAGES:
        page = root / name
        text = page.read_text(encoding="utf-8")
        shown = pictures(folder, page) if "pictures" in markers.names(text) else ""
        pages[page] = markers.fill(text, {**made, "pictures": shown})
    return pages


def main() -> None:
    """Draw, then write the pages that changed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("--root", type=Path, default=ROOT)
    args = parser.parse_args()
    content = json.loads(args.results.read_text(encoding="utf-8"))
    folder = args.root / "docs/bench"
    for old in folder.glob("*.svg"):
        old.unlink()  # of an earlier run that measured more
    plots.draw(list(content["rows"].values()), folder)
    for page, text in filled(content, args.root, folder).items():
        if page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")
            print(f"{page.relative_to(args.root)} written")


if __name__ == "__main__":
    main()
