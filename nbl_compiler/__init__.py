"""nbl_compiler: a torch.compile backend that linearizes blocks of pretrained transformers.

    plan = nbl.calibrate(model, batches, nbl.Config(...))
    fast = torch.compile(model, backend="nbl", options={"plan": plan})

Importing the package is cheap: no transformers, no CUDA initialisation, no compiler.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nbl_compiler import errors
from nbl_compiler.config import FFN, Attention, Config

if TYPE_CHECKING:
    from nbl_compiler.calibration import calibrate
    from nbl_compiler.explanation import Report, explain
    from nbl_compiler.guard_counters import GuardCounts
    from nbl_compiler.guards import guard_counts, guard_recall, reset_guard_counts
    from nbl_compiler.kv_cache import cache, cache_bytes
    from nbl_compiler.monitoring.monitor import Monitor, monitor
    from nbl_compiler.monitoring.verdict import MonitorLimits, SiteTraffic
    from nbl_compiler.passes.base import Pass, PassReport, Rejected
    from nbl_compiler.planning.budget import Budget, Space
    from nbl_compiler.planning.front import Front
    from nbl_compiler.planning.plan_for_budget import plan
    from nbl_compiler.plans import Plan, Site
    from nbl_compiler.refitting.refit_plan import refit
    from nbl_compiler.registry import attach
    from nbl_compiler.resident import Released, release, resident_bytes
    from nbl_compiler.text import token_batches

__version__ = "0.1.0"

_HOMES = {
    "Budget": "nbl_compiler.planning.budget",
    "Front": "nbl_compiler.planning.front",
    "Pass": "nbl_compiler.passes.base",
    "PassReport": "nbl_compiler.passes.base",
    "Plan": "nbl_compiler.plans",
    "Site": "nbl_compiler.plans",
    "attach": "nbl_compiler.registry",
    "cache": "nbl_compiler.kv_cache",
    "cache_bytes": "nbl_compiler.kv_cache",
    "calibrate": "nbl_compiler.calibration",
    "explain": "nbl_compiler.explanation",
    "guard_counts": "nbl_compiler.guards",
    "guard_recall": "nbl_compiler.guards",
    "GuardCounts": "nbl_compiler.guard_counters",
    "monitor": "nbl_compiler.monitoring.monitor",
    "Monitor": "nbl_compiler.monitoring.monitor",
    "MonitorLimits": "nbl_compiler.monitoring.verdict",
    "plan": "nbl_compiler.planning.plan_for_budget",
    "refit": "nbl_compiler.refitting.refit_plan",
    "release": "nbl_compiler.resident",
    "Released": "nbl_compiler.resident",
    "Rejected": "nbl_compiler.passes.base",
    "Report": "nbl_compiler.explanation",
    "reset_guard_counts": "nbl_compiler.guards",
    "resident_bytes": "nbl_compiler.resident",
    "Space": "nbl_compiler.planning.budget",
    "SiteTraffic": "nbl_compiler.monitoring.verdict",
    "token_batches": "nbl_compiler.text",
}

__all__ = [
    "FFN",
    "Attention",
    "Budget",
    "Config",
    "Front",
    "GuardCounts",
    "Monitor",
    "MonitorLimits",
    "Pass",
    "PassReport",
    "Plan",
    "Rejected",
    "Released",
    "Report",
    "Site",
    "SiteTraffic",
    "Space",
    "__version__",
    "attach",
    "cache",
    "cache_bytes",
    "calibrate",
    "errors",
    "explain",
    "guard_counts",
    "guard_recall",
    "monitor",
    "plan",
    "refit",
    "release",
    "reset_guard_counts",
    "resident_bytes",
    "token_batches",
]


def __getattr__(name: str) -> Any:
    """Load the public names on first use."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)
