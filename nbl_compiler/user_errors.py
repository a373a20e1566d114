"""Handing errors of this package to the user as they are, through Dynamo."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nbl_compiler.errors import NBLError


@contextmanager
def reported_by_dynamo() -> Iterator[None]:
    """Let an ``NBLError`` that is raised inside a backend reach the user under its own class.

    Dynamo wraps what backends raise into ``BackendCompilerFailed`` unless it is a
    ``ShortenTraceback``; so the error gets that as a second base.
    """
    try:
        yield
    except NBLError as error:
        raise _shortened(error) from error.__cause__


def _shortened(error: NBLError) -> NBLError:
    from torch._dynamo.exc import ShortenTraceback

    def initialise(self: Any, message: str) -> None:
        Exception.__init__(self, message)
        self.first_useful_frame = None

    kind = type(error)
    namespace = {"__init__": initialise, "__module__": kind.__module__}
    both = type(kind.__name__, (kind, ShortenTraceback), namespace)
    result = both(str(error))
    assert isinstance(result, NBLError)
    return result
