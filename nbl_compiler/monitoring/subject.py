"""From what the user hands to ``nbl_compiler.monitor`` to a plan and a model's weights."""

from __future__ import annotations

from os import fspath
from typing import Any

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from nbl_compiler import registry
from nbl_compiler.errors import ConfigError
from nbl_compiler.monitoring.watch import Subject, known_graphs
from nbl_compiler.plan_file import load_shared
from nbl_compiler.plans import Plan

_WANTED = 'what torch.compile(model, backend="nbl") returned, the compiled model, or a plan'


def find_subject(compiled: object, plan: Plan | None) -> Subject:
    """Return what is to be monitored.

    Raises:
        ConfigError: as ``nbl_compiler.monitor``.
    """
    if isinstance(compiled, Plan):
        if plan not in (None, compiled):
            raise ConfigError("monitor was given two plans; give one")
        return _checked(Subject(compiled, None))
    model = _model(compiled)
    if model is None:
        if plan is None:
            raise ConfigError(
                f"monitor cannot tell which model {compiled!r} runs; give it {_WANTED}, or "
                "plan=... as well"
            )
        return _checked(Subject(plan, None))
    weights = WeakIdKeyDictionary()
    for parameter in model.parameters():
        weights[parameter] = True
    subject = Subject(plan or _plan_of(compiled, model), weights)
    if subject.plan is None and not _may_have_a_plan(compiled, subject):
        raise ConfigError(
            f"{type(model).__name__} runs no plan: calibrate one with nbl.calibrate(model, "
            f"batches), compile with it, and give monitor {_WANTED}"
        )
    return _checked(subject)


def _checked(subject: Subject) -> Subject:
    if subject.plan is not None and not subject.plan.rewritten:
        raise ConfigError("the plan rewrites no site: there is nothing to monitor")
    return subject


def _model(compiled: object) -> nn.Module | None:
    """Return the model behind what was compiled, or None for a function of unknown weights.

    Raises:
        ConfigError: if it is nothing that torch.compile makes or takes.
    """
    if _is_optimized(compiled):
        _refuse_other_backends(compiled)
        model = getattr(compiled, "_orig_mod", None)
        return model if isinstance(model, nn.Module) else None
    if isinstance(compiled, nn.Module):
        return compiled
    if not hasattr(compiled, "_torchdynamo_orig_callable"):
        raise ConfigError(f"monitor takes {_WANTED}, not {compiled!r}")
    owner = getattr(compiled._torchdynamo_orig_callable, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


def _is_optimized(compiled: object) -> bool:
    from torch._dynamo.eval_frame import OptimizedModule

    return isinstance(compiled, OptimizedModule)


def _backend(optimized: Any) -> Any:
    from torch._dynamo.eval_frame import innermost_backend

    return innermost_backend(optimized.dynamo_ctx.callback)


def _refuse_other_backends(optimized: Any) -> None:
    """Raise for a backend of torch's own; one of the user's may call this package's."""
    import torch._dynamo

    name = getattr(_backend(optimized), "compiler_name", "nbl")
    if name != "nbl" and name in torch._dynamo.list_backends(None):
        raise ConfigError(
            f"the model is compiled with backend={name!r}, which runs no plan; compile it with "
            'backend="nbl"'
        )


def _plan_of(compiled: object, model: nn.Module) -> Plan | None:
    """Return the plan that is sure to be meant, or None: then all plans of the model count.

    Only what torch.compile returned for a model shows its options.
    """
    if not _is_optimized(compiled) or not _is_own(compiled):
        return None
    given = (_backend(compiled).kwargs.get("options") or {}).get("plan")
    if given is None:
        return registry.find_plan(model.parameters())
    return given if isinstance(given, Plan) else load_shared(fspath(given))


def _is_own(optimized: object) -> bool:
    return getattr(_backend(optimized), "compiler_name", "") == "nbl"


def _may_have_a_plan(compiled: object, subject: Subject) -> bool:
    """Tell whether graphs of the model run a plan, or may when they are compiled."""
    if _is_optimized(compiled):
        return not _is_own(compiled)
    if known_graphs(subject) or not isinstance(compiled, nn.Module):
        return True
    attached = registry.find_plan(compiled.parameters()) is not None
    return attached or any(_is_compiled(module) for module in compiled.modules())


def _is_compiled(module: nn.Module) -> bool:
    in_place = module._compiled_call_impl is not None
    replaced = hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
    return in_place or replaced or _is_optimized(module)
