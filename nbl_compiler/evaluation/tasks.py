"""Tasks of lm-evaluation-harness, for the dense model and under a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from nbl_compiler.errors import ConfigError


def find_tasks(names: Sequence[str], folder: Path | None = None) -> Any:
    """Return a task manager of the harness that knows the tasks.

    Args:
        names: Tasks that the harness knows, or that ``folder`` defines.
        folder: Further task files (``*.yaml``); their data may be local files.

    Raises:
        ConfigError: if the harness is not installed, or a task is not known.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            f"tasks are run by lm-evaluation-harness ({error}): pip install lm-eval accelerate"
        ) from error
    if folder is not None:
        if not folder.is_dir():
            raise ConfigError(f"no folder of tasks at {folder}")
        # Reading the harness's own thousands of task files takes half a minute.
        own = TaskManager(include_path=str(folder), include_defaults=False)
        if set(names) <= set(own.all_tasks):
            return own
    manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = sorted(set(names) - set(manager.all_tasks))
    if unknown:
        raise ConfigError(
            f"the harness knows no task {', '.join(unknown)}; `lm-eval --tasks list` lists them"
        )
    return manager


def run_tasks(
    dense: Callable[..., Any],
    nbl: Callable[..., Any],
    tokenizer: Any,
    names: Sequence[str],
    manager: Any,
    limit: int | None = None,
) -> dict[str, dict[str, tuple[float, float]]]:
    """Return task → metric → (dense, under the plan).

    Args:
        dense: The dense model.
        nbl: The model compiled with a plan.
        tokenizer: Its tokenizer.
        names: Tasks that ``manager`` knows.
        manager: What ``find_tasks`` returned for them.
        limit: Use so many documents of a task, at most.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    results = []
    for forward in (dense, nbl):
        language_model = HFLM(pretrained=forward, tokenizer=tokenizer, batch_size=1)
        with torch.no_grad():
            made = lm_eval.simple_evaluate(
                model=language_model, tasks=list(names), task_manager=manager, limit=limit,
                bootstrap_iters=0, verbosity="ERROR",
            )  # fmt: skip
        results.append(made["results"])
    before, after = results
    return {
        task: {
            metric.removesuffix(",none"): (float(value), float(after[task][metric]))
            for metric, value in metrics.items()
            if isinstance(value, int | float) and "stderr" not in metric and metric != "alias"
        }
        for task, metrics in before.items()
    }
