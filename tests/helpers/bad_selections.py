"""Choices of sites that ``Attention`` and ``FFN`` both refuse, and what they say."""

from __future__ import annotations

from typing import Any

BAD_SELECTIONS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"count": 1, "layers": (0,)}, "give either `count` or `layers`, not both"),
    ({"count": -1}, "count=-1 must be an integer of at least 0"),
    ({"count": True}, "count=True must be an integer"),
    ({"count": 1.5}, r"count=1\.5 must be an integer"),
    ({"count": "2"}, "count='2' must be an integer"),
    ({"layers": (1.5,)}, r"layers holds 1\.5; give site indices or site names"),
    ({"layers": (True,)}, "layers holds True"),
    ({"layers": 3}, "layers=3 must be a sequence of site indices or site names"),
    ({"layers": "model"}, "layers='model' must be a sequence"),
    ({"max_nmse": 0}, "max_nmse=0 must be positive"),
    ({"max_nmse": -0.5}, r"max_nmse=-0\.5 must be positive"),
    ({"max_nmse": float("nan")}, "max_nmse=nan must be positive"),
    ({"max_nmse": True}, "max_nmse=True must be positive"),
    ({"max_nmse": "small"}, "max_nmse='small' must be positive"),
)
