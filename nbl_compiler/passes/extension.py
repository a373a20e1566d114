"""Passes of the user's own in the pipeline: ``options={"passes": [...]}``.

They are verified, timed, dumped and logged like the others, because the same runner runs them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from nbl_compiler.errors import ConfigError
from nbl_compiler.passes.base import Pass

DEFAULT_PLACE = "clean_up"
"""A pass that does not say where it belongs runs in front of this one: after all rewrites."""

_NOT_ALWAYS = frozenset({"stream_products"})
"""Depends on the lowering; where it is missing, its place is the end."""


def check_passes(passes: object) -> tuple[Pass, ...]:
    """Return the passes as a tuple.

    Raises:
        ConfigError: if one is no pass, has no usable name, or shares it with another.
    """
    if isinstance(passes, str) or not isinstance(passes, Sequence):
        raise ConfigError(f"passes={passes!r} must be a list of pass objects")
    seen: set[str] = set()
    for step in passes:
        if not isinstance(step, Pass) or not callable(step) or isinstance(step, type):
            raise ConfigError(
                f"passes holds {step!r}; a pass is an object with a `name` that is called with a "
                "GraphModule and returns a PassReport (docs/own-pass.md)"
            )
        if not isinstance(step.name, str) or not re.fullmatch(r"\w+", step.name):
            raise ConfigError(f"the pass name {step.name!r} must be a word: it names files")
        if step.name in seen:
            raise ConfigError(f"two passes are named {step.name!r}")
        seen.add(step.name)
    return tuple(passes)


def insert_passes(pipeline: Sequence[Pass], extra: Sequence[Pass]) -> tuple[Pass, ...]:
    """Return the pipeline with the extra passes in their places, in the order they were given.

    A pass runs in front of the one that its attribute ``before`` names, or at the very end if
    ``before`` is None; without the attribute, in front of ``clean_up``.

    Args:
        pipeline: The built-in passes.
        extra: The user's.

    Raises:
        ConfigError: if a place does not exist, or a name is taken.
    """
    steps = list(pipeline)
    for step in extra:
        names = [known.name for known in steps]
        if step.name in names:
            raise ConfigError(f"the pipeline has a pass named {step.name!r} already")
        place = getattr(step, "before", DEFAULT_PLACE)
        if place in _NOT_ALWAYS - set(names):
            place = None
        if place is not None and place not in names:
            raise ConfigError(
                f"pass {step.name!r} wants to run before {place!r}; there are {', '.join(names)}"
            )
        steps.insert(len(steps) if place is None else names.index(place), step)
    return tuple(steps)
