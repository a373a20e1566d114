"""Models that ``device_map`` spread over devices, the host's memory and disk.

accelerate moves activations, and weights that are stored elsewhere, in hooks around each module.
Dynamo does not look into these hooks, so the graph would end at every one of them, and no graph
would hold a whole site. While calibration runs, hooks that Dynamo can follow do the same instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nbl_compiler.errors import ConfigError


@dataclass(frozen=True)
class _Stored:
    """A weight that is kept in the host's memory or on disk: ``owner.name`` is on ``meta``."""

    owner: nn.Module
    name: str
    value: nn.Parameter


@contextmanager
def traceable(model: nn.Module) -> Iterator[None]:
    """Let Dynamo see the model without the breaks that hooks of a device map make.

    Inside, weights that are kept elsewhere are parameters with values: those on disk are mapped
    into memory, and read when they are used.

    Raises:
        ConfigError: if the model has hooks of another kind.
    """
    with ExitStack() as undo:
        hooked = [(n, m) for n, m in model.named_modules() if hasattr(m, "_hf_hook")]
        for name, module in hooked:
            _replace_hook(name, module, undo)
        if hooked:
            _return_outputs(model, undo)
        yield


def _replace_hook(name: str, module: nn.Module, undo: ExitStack) -> None:
    hook: Any = module._hf_hook
    parts = list(getattr(hook, "hooks", [hook]))  # a chain of several
    for part in parts:
        if type(part).__name__ != "AlignDevicesHook" or part.offload_buffers:
            raise ConfigError(
                f"{name or 'the model'} has a hook that calibration cannot follow "
                f"({type(part).__name__}); load the model with a plain device_map, and with "
                "offload_buffers=False"
            )
    stored = [one for part in parts if part.offload for one in _stored(module, part)]
    for one in stored:
        undo.callback(_set, one.owner, one.name, one.owner._parameters[one.name])
        _set(one.owner, one.name, one.value)
    undo.callback(setattr, module, "forward", module.__dict__["forward"])
    own: Any = module._old_forward
    if getattr(own, "__func__", None) is type(module).forward:
        del module.__dict__["forward"]  # Dynamo names modules by how it reached them
    else:
        module.forward = own
    devices = [p.execution_device for p in parts if p.execution_device is not None]
    if devices:
        _move_to(module, torch.device(devices[0]), stored, undo)


def _stored(module: nn.Module, hook: Any) -> Iterator[_Stored]:
    for path, parameter in module.named_parameters(recurse=hook.place_submodules):
        if parameter.is_meta:
            owner_path, _, name = path.rpartition(".")
            value = nn.Parameter(hook.weights_map[path], requires_grad=False)
            yield _Stored(module.get_submodule(owner_path), name, value)


def _set(owner: nn.Module, name: str, value: Any) -> None:
    owner._parameters[name] = value


def _move_to(
    module: nn.Module, device: torch.device, stored: Sequence[_Stored], undo: ExitStack
) -> None:
    """Let a module bring its inputs, and weights that are kept elsewhere, to where it runs."""
    brought = [one for one in stored if one.value.device != device]

    def before(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        for one in brought:
            one.owner._parameters[one.name] = one.value.to(device)  # type: ignore[assignment]
        return _to(args, device), _to(kwargs, device)

    def after(_: nn.Module, args: Any, output: Any) -> None:
        for one in brought:
            one.owner._parameters[one.name] = one.value

    undo.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
    if brought:
        undo.callback(module.register_forward_hook(after).remove)


def _return_outputs(model: nn.Module, undo: ExitStack) -> None:
    """Let the model return its outputs where its first weights, and so its inputs, are."""
    home = next(model.parameters()).device

    def after(_: nn.Module, args: Any, output: Any) -> Any:
        return _to(output, home)

    undo.callback(model.register_forward_hook(after).remove)


def _to(values: Any, device: torch.device) -> Any:
    # A move that changes nothing would still be a node between a site's input and its projections.
    def move(value: Tensor) -> Tensor:
        return value if value.device == device else value.to(device)

    return pytree.tree_map_only(Tensor, move, values)
