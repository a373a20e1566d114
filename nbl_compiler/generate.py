"""Generation: a greedy loop of this package's own, and transformers' ``generate``."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def greedy(
    forward: Callable[..., Any], ids: Tensor, cache: Any, new_tokens: int, stop: int | None = None
) -> Tensor:
    """Extend a prompt by the most likely tokens.

    Args:
        forward: The model, compiled or not.
        ids: Prompt [1, T].
        cache: A transformers cache with room for T + new_tokens positions.
        new_tokens: Number of tokens to add, at most.
        stop: End early after this token.

    Returns:
        The new tokens, [1, at most new_tokens].
    """
    made: list[Tensor] = []
    step = ids
    with torch.no_grad():
        for _ in range(new_tokens):
            logits = forward(input_ids=step, past_key_values=cache).logits
            step = logits[:, -1:].argmax(-1)
            made.append(step)
            if stop is not None and int(step) == stop:
                break
    return torch.cat(made, dim=1) if made else ids[:, :0]


def run_compiled_in_generate(backend: Callable[..., Any]) -> None:
    """Make ``torch.compile(model, backend=backend).generate`` run the compiled model.

    What ``torch.compile`` returns hands every attribute of the model on, ``generate`` too, and that
    method calls the model as it was: without a word it would run dense. A module that was compiled
    with another backend is left as torch made it.
    """
    from torch._dynamo.eval_frame import OptimizedModule, innermost_backend

    hand_on = OptimizedModule.__getattr__

    def __getattr__(self: Any, name: str) -> Any:
        value = hand_on(self, name)
        if name != "generate":
            return value
        used = innermost_backend(self.dynamo_ctx.callback)
        return _compiled(self, value) if getattr(used, "compiler_fn", used) is backend else value

    OptimizedModule.__getattr__ = __getattr__  # type: ignore[method-assign]


def _compiled(optimized: Any, generate: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``generate`` with the model compiled in place (``Module.compile``) while it runs."""

    @wraps(generate)
    def compiled_generate(*args: Any, **kwargs: Any) -> Any:
        model = optimized._orig_mod
        before = model._compiled_call_impl
        model._compiled_call_impl = optimized.dynamo_ctx(model._call_impl)
        try:
            return generate(*args, **kwargs)
        finally:
            model._compiled_call_impl = before

    return compiled_generate
