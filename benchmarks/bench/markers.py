"""Generated parts of a page: what stands between two comments."""

from __future__ import annotations

import re
from collections.abc import Mapping

_PART = re.compile(r"(<!-- bench:([a-z-]+) -->\n).*?(<!-- /bench:\2 -->)", re.DOTALL)


def fill(page: str, parts: Mapping[str, str]) -> str:
    """Return the page with every marked part replaced.

    Args:
        page: Markdown with ``<!-- bench:name -->`` and ``<!-- /bench:name -->``, each on a line.
        parts: Name → Markdown.

    Raises:
        KeyError: if the page asks for a part that there is not.
    """
    return _PART.sub(lambda found: f"{found[1]}\n{parts[found[2]].strip()}\n\n{found[3]}", page)


def names(page: str) -> list[str]:
    """Return the parts that a page asks for."""
    return [found[2] for found in _PART.finditer(page)]
