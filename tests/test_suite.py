"""The suite itself."""

from __future__ import annotations

import os

import pytest


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="there are no workers")
@pytest.mark.xdist_group("together")
def test_groups_stay_together(request: pytest.FixtureRequest) -> None:
    """A scenario is computed once for all tests of its group, which halves the time of the suite.

    pytest-xdist knows a group by what it adds to the test's name.
    """
    assert request.node.nodeid.endswith("@together")
