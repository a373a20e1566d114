"""What runs when a dumped file is executed."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nbl_compiler.dumps.compare import largest_error, tolerance_for
from nbl_compiler.dumps.failure import copied
from nbl_compiler.dumps.inputs import ambient, read_inputs
from nbl_compiler.dumps.parse import load_graph
from nbl_compiler.dumps.values import NodeValues
from nbl_compiler.errors import NBLError
from nbl_compiler.lowering.lower import LOWERINGS, lower


def main(module: type[nn.Module], file: str, inputs: str, lowering: str) -> None:
    """Run a dumped graph and print what it returns.

    Args:
        module: The class in the file.
        file: The file.
        inputs: Name of the file of inputs beside it.
        lowering: How it is run besides eagerly, unless the command line says otherwise.
    """
    parser = argparse.ArgumentParser(description="Run this graph on the inputs it was traced with.")
    parser.add_argument("--lowering", choices=LOWERINGS, default=lowering)
    parser.add_argument("--save", metavar="FILE", help="write the outputs as safetensors")
    asked = parser.parse_args()
    path = Path(file)
    try:
        with ambient(path.with_name(inputs)):
            _main(module, path, path.with_name(inputs), asked.lowering, asked.save)
    except NBLError as error:
        sys.stderr.write(f"{path.name}: {error}\n")
        sys.exit(1)


def _main(
    module: type[nn.Module], path: Path, inputs: Path, lowering: str, save: str | None
) -> None:
    values, own = read_inputs(inputs)
    outputs = run_class(module, values, own)
    print(f"{path.name}, eager")
    _print_outputs(outputs)
    if lowering != "eager":
        expected = outputs
        graph_module, example = load_graph(path, inputs)
        tolerance = tolerance_for(NodeValues.on(graph_module, example).noted.values())
        outputs = lower(graph_module, copied(example), lowering)(*copied(example))
        print(f"{path.name}, {lowering}")
        _print_outputs(outputs)
        error = largest_error(expected, outputs)
        print(f"{lowering} against eager: relative error {error:.2e} (tolerance {tolerance:.0e})")
    if save is not None:
        leaves = [t.detach().cpu().contiguous() for t in tree_leaves(outputs)]
        safetensors.torch.save_file({f"output_{i}": t for i, t in enumerate(leaves)}, save)


def run_class(module: type[nn.Module], inputs: dict[str, Any], own: dict[str, Tensor]) -> Any:
    """Run a dumped class eagerly.

    Args:
        module: The class; those of the modules it calls lie inside it.
        inputs: Values by the names of ``forward``'s arguments; others are passed over.
        own: Tensors that it reads as attributes, by their dotted names.
    """
    instance = _instance(module)
    for name, tensor in own.items():
        *parents, last = name.split(".")
        place: Any = instance
        for part in parents:
            place = getattr(place, part)
        place.__dict__[last] = tensor
    forward: Callable[..., Any] = instance.forward
    code = module.forward.__code__
    names = code.co_varnames[1 : code.co_argcount]
    return forward(**{name: inputs[name] for name in names})


def _instance(module: type[nn.Module]) -> nn.Module:
    instance = module()
    for name, value in vars(module).items():
        if isinstance(value, type) and issubclass(value, nn.Module):
            instance.__dict__[name] = _instance(value)  # an attribute of the class hides modules
    return instance


def _print_outputs(outputs: Any) -> None:
    for index, value in enumerate(tree_leaves(outputs)):
        print(f"  output {index}: {_line(value)}")


def _line(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    plain = value.detach().cpu().contiguous()
    data = plain.reshape(-1).view(torch.uint8).numpy().data
    digest = hashlib.blake2b(data, digest_size=8).hexdigest()
    kind = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    wide = plain.double() if not plain.is_complex() else plain.abs().double()
    size = (
        f"mean {float(wide.mean()):.6e}, largest {float(wide.abs().max()):.6e}, "
        if plain.numel()
        else ""
    )
    return f"{kind}, {size}checksum {digest}"
