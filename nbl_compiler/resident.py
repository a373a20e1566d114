"""Resident memory: what a model and a plan hold, and letting go of what is no longer read.

A folded FFN keeps copies of a few rows of its weights, and a linearized attention layer none; the
originals stay resident until ``release``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.fx import GraphModule

from nbl_compiler import registry
from nbl_compiler.errors import ConfigError, WeightsReleasedError
from nbl_compiler.fingerprint import remember_sketch, sketch
from nbl_compiler.int8_weights import held_parts, held_tensors, is_quantized
from nbl_compiler.passes.ffn_weights import parameter_value
from nbl_compiler.passes.graph_tools import is_weight
from nbl_compiler.passes.pipeline import build_pipeline, run_pipeline
from nbl_compiler.passes.private_copy import private_copy
from nbl_compiler.plans import Plan
from nbl_compiler.released_weights import is_released, mark_released, refuse_released
from nbl_compiler.user_errors import reported_by_dynamo


@dataclass(frozen=True)
class Released:
    """What ``release`` did.

    Args:
        parameters: Names of the parameters let go of by this call.
        bytes: Bytes that they held.
        earlier: Names of those that an earlier call had let go of.
    """

    parameters: tuple[str, ...]
    bytes: int
    earlier: tuple[str, ...]

    def __str__(self) -> str:
        text = f"released {len(self.parameters)} parameters, {self.bytes:,} bytes"
        return f"{text}; {len(self.earlier)} were released before" if self.earlier else text


def release(model: nn.Module, plan: Plan | None = None, *args: Any, **kwargs: Any) -> Released:
    """Let go of the weights that the rewritten graphs never read.

    The model is traced on example inputs; a parameter that every traced graph leaves unread after
    the rewrite gives its memory back, and stays in its place as a stand-in of the same shape.
    Graphs can be traced anew. The model as it is can no longer run, be saved, or be calibrated:
    all of that raises ``WeightsReleasedError``.

    Args:
        model: The model; not a part of another one, which would lose its weights as well.
        plan: By default the attached one.
        *args: Example inputs, as for the model; by default a few token ids.
        **kwargs: Example inputs.

    Raises:
        ConfigError: if there is no plan, or no example inputs are given and none are known.
        PlanMismatchError: if the plan is for other weights.
    """
    model = getattr(model, "_orig_mod", model)
    plan = plan or registry.find_plan(model.parameters())
    if plan is None:
        raise ConfigError("nothing to release: the model has no plan; pass it, or calibrate first")
    if not args and not kwargs:
        kwargs = _example_inputs(model)
    registry.check_weights(dict(model.named_parameters()), plan, type(model).__name__)
    unread = unread_parameters(model, plan, args, kwargs)
    names: list[str] = []
    earlier: list[str] = []
    freed = 0
    for name, parameter in model.named_parameters():
        if is_released(parameter):
            earlier.append(name)
        elif parameter in unread:
            freed += storage_bytes([parameter])
            names.append(name)
            _let_go(parameter)
    for module in model.modules():
        if any(map(is_released, module.parameters(recurse=False))):
            _guard_module(module)
    torch._dynamo.reset()
    return Released(tuple(names), freed, tuple(earlier))


def resident_bytes(model: nn.Module, plan: Plan | None = None) -> int:
    """Return the bytes that a model's weights and buffers, and a plan's tensors, hold."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    if plan is not None:
        tensors += plan.live_tensors()
    return storage_bytes(tensors)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the tensors' storages, each counted once."""
    held = [part.untyped_storage() for tensor in tensors for part in held_tensors(tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())


def _example_inputs(model: nn.Module) -> dict[str, Any]:
    known = getattr(model, "dummy_inputs", None)
    if not isinstance(known, Mapping):
        raise ConfigError(
            "give example inputs for the model: release(model, plan, *args, **kwargs)"
        )
    device = next(model.parameters()).device
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in known.items()}


def unread_parameters(
    model: nn.Module, plan: Plan, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> set[nn.Parameter]:
    """Return the parameters that come into rewritten graphs and are read by none of them.

    Args:
        model: Traced, neither changed nor run compiled.
        plan: What rewrites the graphs.
        args: Example inputs.
        kwargs: Example inputs.
    """
    read: set[nn.Parameter] = set()
    unread: set[nn.Parameter] = set()

    def backend(graph_module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        copy = private_copy(graph_module)
        with reported_by_dynamo():
            run_pipeline(build_pipeline(plan), copy)
        for node in copy.graph.nodes:
            if is_weight(node) and (value := parameter_value(node)) is not None:
                (read if node.users else unread).add(value)
        return graph_module.forward

    with torch.no_grad():
        torch.compile(lambda *a, **k: model(*a, **k), backend=backend)(*args, **kwargs)
    return unread - read


def _let_go(parameter: nn.Parameter) -> None:
    known = sketch(parameter)
    if is_quantized(parameter):
        for name, part in held_parts(parameter).items():
            setattr(parameter, name, _stand_in(part))
    else:
        parameter.data = _stand_in(parameter)
    mark_released(parameter)
    remember_sketch(parameter, known)


def _stand_in(like: Tensor) -> Tensor:
    """Return a tensor of the same shape that holds one element.

    Not-a-number (int8 codes: by their scale), so that whoever reads it all the same does not get a
    plausible result.
    """
    value = torch.nan if like.is_floating_point() else 0
    return torch.full((1,), value, dtype=like.dtype, device=like.device).expand(like.shape)


_GUARDED = "_nbl_weights_released"


def _guard_module(module: nn.Module) -> None:
    """Make the module refuse to run uncompiled and to be saved."""
    if getattr(module, _GUARDED, False):
        return
    setattr(module, _GUARDED, True)

    def refuse_to_run(module: nn.Module, args: object) -> None:
        if not torch.compiler.is_compiling():
            refuse_released(module.parameters(recurse=False), "running this model uncompiled")

    def refuse_to_save(module: nn.Module, prefix: str, keep_vars: bool) -> None:
        raise WeightsReleasedError(
            f"{prefix.rstrip('.') or 'the model'} cannot be saved: nbl.release let go of its "
            "weights; load the model again"
        )

    module.register_forward_pre_hook(refuse_to_run)
    module.register_state_dict_pre_hook(refuse_to_save)
