"""Why Dynamo is compiling the graph that a backend was just handed."""

from __future__ import annotations

from torch._dynamo.utils import get_metrics_context
from torch._guards import CompileContext

from nbl_compiler.identity_guard import code_being_compiled


def compile_reason() -> str:
    """Return one sentence: the guard that failed, or that it is the first time."""
    if CompileContext.current_compile_id() is None:
        return "the backend was called outside Dynamo"
    # Dynamo notes the reason before it calls the backend, among the metrics of this compilation;
    # its other ways to tell (logs, hooks) need configuration before the first call.
    metrics = getattr(get_metrics_context(), "_metrics", {})
    if "recompile_reason" not in metrics:
        return "unknown (this version of torch does not say)"
    reason = metrics["recompile_reason"]
    if reason is None:
        return "first compilation of this code"
    return f"recompiled; the code compiled earlier did not fit: {' '.join(str(reason).split())}"


def compiled_code() -> str:
    """Return which Python function is compiled, and Dynamo's number for it, such as ``[0/1]``."""
    code, number = code_being_compiled(), CompileContext.current_compile_id()
    where = (
        "unknown"
        if code is None
        else f"{code.co_qualname} ({code.co_filename}:{code.co_firstlineno})"
    )
    return where if number is None else f"{where} [{number}]"
