"""A recipe that has no meaning for a model."""

from __future__ import annotations


class DoesNotApply(Exception):
    """The message says why; the benchmark prints it and goes on to the next contender."""
