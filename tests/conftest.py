"""One Hypothesis profile, a fresh Dynamo for every test, and a quiet transformers."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
import torch._dynamo
import transformers
from hypothesis import HealthCheck, settings
from models.architectures import BY_NAME

settings.register_profile(
    "nbl",
    deadline=None,  # compiling takes as long as it takes
    derandomize=True,  # a failure in CI is a failure here
    print_blob=True,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("nbl")
transformers.logging.set_verbosity_error()


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group tests by family, else by file, if they have no group: scenarios are computed once.

    Begin with the real models, which one worker runs, and end with the folders, whose tests are
    short: else one worker waits for the other.
    """
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(_family(item) or item.path.name))
    items.sort(key=lambda item: (item.get_closest_marker("pretrained") is None, _depth(item)))


def _family(item: pytest.Item) -> str | None:
    """Return the family of models that a test is a parameter's value for."""
    called = getattr(item, "callspec", None)
    name = called.params.get("name") if called else None
    return name if isinstance(name, str) and name in BY_NAME else None


def _depth(item: pytest.Item) -> int:
    return len(item.path.parts)


def pytest_collection_finish() -> None:
    """Look for reference cycles less often, and not among what was imported.

    Tracing makes so many objects that the collector otherwise takes an eighth of its time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(autouse=True, scope="module")
def collected() -> Iterator[None]:
    """Free what compiling left in reference cycles; over the whole suite that is gigabytes.

    What is still alive then is kept by caches to the end, and no longer looked at.
    """
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture
def fixed_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let plans be made for a machine that nobody measures: probes are compiled by Inductor."""
    from nbl_compiler.cost import Machine
    from nbl_compiler.planning import plan_for_budget

    machine = Machine(1e9, 1e10, 2e9, 2e9)
    monkeypatch.setattr(plan_for_budget, "measure_machine", lambda **_: machine)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Keep compiled code, warnings already given and seeds from leaking between tests."""
    from nbl_compiler import backend

    torch.manual_seed(0)
    torch._dynamo.reset()
    backend._warned.clear()
    yield
    torch._dynamo.reset()
