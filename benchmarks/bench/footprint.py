"""Bytes that a contender holds and reads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from bench.contenders import Made
from nbl_compiler.resident import storage_bytes, unread_parameters


def held_bytes(made: Made, **inputs: Any) -> int:
    """Return the bytes of weights, buffers and plan once what is not read was released.

    Args:
        made: A contender.
        **inputs: Example inputs, to trace what is read.
    """
    gone: set[nn.Parameter] = set()
    tensors: list[Tensor] = list(made.model.buffers())
    if made.plan is not None:
        gone = unread_parameters(made.model, made.plan, (), inputs)
        tensors += made.plan.live_tensors()
    return storage_bytes(inner_tensors([*tensors, *(set(made.model.parameters()) - gone)]))


def weight_bytes_read(made: Made) -> int:
    """Return the bytes of weights that one decoded token reads.

    An input embedding that is not also the output matrix is read one row a token, and so are
    positions; weights that kernels of a contender's paper would leave unread do not count.
    """
    model = made.model
    embeddings = {
        id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)
    }  # fmt: skip
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        embeddings.discard(id(head.weight))
    read = [p for p in model.parameters() if id(p) not in embeddings]
    saved = made.unread
    if made.plan is not None:
        saved += sum(s.details["parameters"] - s.parameters_read for s in made.plan.rewritten)
    return storage_bytes(inner_tensors(read)) - round(saved * _bytes_a_weight(model))


def _bytes_a_weight(model: nn.Module) -> float:
    """Return the bytes of one weight in the blocks; a plan's matrices are stored as those are."""
    weights = [m.weight for m in model.base_model.modules() if isinstance(m, nn.Linear)]
    return storage_bytes(inner_tensors(weights)) / sum(w.numel() for w in weights)


def inner_tensors(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the plain tensors behind tensor subclasses, such as quantized weights."""
    plain: list[Tensor] = []
    for tensor in tensors:
        names = getattr(tensor, "__tensor_flatten__", None)
        if names is None:
            plain.append(tensor)
        else:
            plain += inner_tensors(getattr(tensor, name) for name in names()[0])
    return plain


_MEMORY: dict[str, Any] = {"activities": [ProfilerActivity.CPU], "profile_memory": True}


@contextmanager
def _native_stderr_off() -> Iterator[None]:
    """Keep the profiler's own log, which no setting turns off, from the terminal."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(nowhere)
        os.close(kept)


def peak_allocated(call: Callable[[], object]) -> int:
    """Return the most bytes that one call held at once of what it allocated itself.

    By PyTorch's own bookkeeping on the CPU; scratch memory inside of libraries is not in it. On a
    GPU, what its allocator reports.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with _native_stderr_off(), profile(**_MEMORY) as profiled:
        call()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
