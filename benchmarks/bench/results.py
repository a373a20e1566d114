"""What was measured, in a file after every point: a run that ends early goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Results:
    """Rows by name.

    Args:
        path: The file, or None to keep nothing.
        settings: What the figures depend on; a file of other settings is refused.
        about: Further facts for a new file, for people.

    Raises:
        SystemExit: if the file holds results of other settings, or cannot be read.
    """

    def __init__(
        self,
        path: Path | None,
        settings: Mapping[str, Any],
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self._path = path
        self._content: dict[str, Any] = {**(about or {}), "settings": dict(settings), "rows": {}}
        if path is not None and path.exists():
            self._content = _read(path)
            known = self._content["settings"]
            names = sorted({*known, *settings})
            other = [n for n in names if known.get(n) != settings.get(n)]
            if other:
                was = {name: known.get(name) for name in other}
                now = {name: settings.get(name) for name in other}
                raise SystemExit(f"{path} holds results of {was}, not of {now}; move it away")

    @property
    def content(self) -> dict[str, Any]:
        """Everything that the file holds."""
        return self._content

    @property
    def rows(self) -> dict[str, Row]:
        """Name → row, in the order measured."""
        rows: dict[str, Row] = self._content["rows"]
        return rows

    def row(self, name: str, make: Callable[[], Row]) -> Row:
        """Return a row, measured if the file does not have it."""
        return self.group([name], lambda: {name: make()})[name]

    def group(self, names: list[str], make: Callable[[], dict[str, Row]]) -> dict[str, Row]:
        """Return rows that are measured together, unless the file has all of them."""
        if not all(name in self.rows for name in names):
            self.rows.update(make())
            self._write()
        return {name: self.rows[name] for name in names}

    def _write(self) -> None:
        if self._path is None:
            return
        scratch = self._path.with_name(self._path.name + ".part")
        scratch.write_text(json.dumps(self._content, indent=1) + "\n")
        os.replace(scratch, self._path)  # whole or as it was


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise SystemExit(f"{path} is no JSON file ({error}); move it away") from None
    if not isinstance(content, dict) or not {"settings", "rows"} <= content.keys():
        raise SystemExit(f"{path} holds no results; move it away")
    return content
