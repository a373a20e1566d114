"""From a rewritten graph to something that runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.fx import GraphModule

from nbl_compiler.errors import ConfigError, ToolchainError
from nbl_compiler.lowering.guarded_ffn_inductor import register_guarded_ffn
from nbl_compiler.lowering.widened import register_widened

Lowering = Literal["inductor", "aot_eager", "eager"]
LOWERINGS: tuple[str, ...] = get_args(Lowering)
Compiled = Callable[..., Any]


def lower(
    graph_module: GraphModule,
    example_inputs: Sequence[Any],
    lowering: str = "inductor",
    inductor_options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Return a callable for the graph.

    Args:
        graph_module: The graph, in the form Dynamo hands to backends.
        example_inputs: One value (or fake) per graph input.
        lowering: ``"inductor"``, or for debugging and tests ``"aot_eager"`` (functionalised,
            run by ATen) or ``"eager"`` (the FX graph as it is).
        inductor_options: Patches of ``torch._inductor.config``.

    Raises:
        ConfigError: for an unknown lowering.
        ToolchainError: if Inductor needs a C++ compiler for the CPU and there is none.
    """
    if lowering == "eager":
        return graph_module.forward
    if lowering == "aot_eager":
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(graph_module, list(example_inputs))
    if lowering != "inductor":
        raise ConfigError(f"lowering={lowering!r} must be one of {', '.join(LOWERINGS)}")
    if any(isinstance(x, Tensor) and x.device.type == "cpu" for x in example_inputs):
        check_cpp_compiler()
    if graph_module.graph.find_nodes(op="call_function", target=torch.ops.nbl.guarded_ffn.default):
        register_guarded_ffn()
    register_widened()
    from torch._inductor.compile_fx import compile_fx

    patches = dict(inductor_options or {})
    return compile_fx(graph_module, list(example_inputs), config_patches=patches or None)  # type: ignore[return-value]


def check_cpp_compiler() -> None:
    """Raise ToolchainError unless Inductor will find a C++ compiler."""
    candidates = torch._inductor.config.cpp.cxx
    names = candidates if isinstance(candidates, list | tuple) else (candidates,)
    if not any(name and shutil.which(name) for name in names):
        raise ToolchainError(
            "Inductor compiles for the CPU with a C++ compiler, and none was found; install one "
            "(Debian: `apt-get install g++`), point CXX at it, or pass "
            'options={"lowering": "eager"}'
        )


def mode_options(mode: str | None) -> dict[str, Any]:
    """Return Inductor's options for torch.compile's ``mode``."""
    if mode in (None, "default"):
        return {}
    from torch._inductor import list_mode_options

    return dict(list_mode_options(mode))
