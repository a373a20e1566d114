"""What a dumped graph is run on: a JSON file beside it, and the tensors it names.

A graph's inputs are the model's inputs, its weights and buffers, and the plan's tensors. All are
kept as they were, except that ``dump_inputs="random"`` describes the weights by shape, mean and
standard deviation: a dump then takes little space, and computes other numbers than the model.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from nbl_compiler.dumps.tensor_store import (
    TensorStore,
    described,
    dtype_named,
    memory_extent,
    traced_number,
)
from nbl_compiler.errors import ConfigError
from nbl_compiler.plan_file import write_atomically

DUMP_INPUTS = ("real", "random")
_NUMBERS = (int, float, bool, str, torch.SymInt, torch.SymFloat)
Entry = dict[str, Any]


def describe(name: str, value: Any, store: TensorStore, random_weights: bool = False) -> Entry:
    """Return one input as JSON, its tensor stored.

    Args:
        name: Name of the graph's input.
        value: A tensor or a number.
        store: Where tensors go.
        random_weights: Describe floating-point parameters and store none of them.
    """
    if isinstance(value, Tensor):
        return _describe_tensor(name, value, store, random_weights)
    if value is None or isinstance(value, _NUMBERS):
        return {"kind": "number", "value": traced_number(value)}
    return _not_storable(value)


def _describe_tensor(name: str, value: Tensor, store: TensorStore, random_weights: bool) -> Entry:
    if isinstance(value, FakeTensor) or value.is_meta:
        return {"kind": "random", **described(value), "seed": _seed(name), "mean": 0.0, "std": 1.0}
    if is_traceable_wrapper_subclass(value) or value.layout != torch.strided:
        return _not_storable(value)
    if random_weights and isinstance(value, nn.Parameter) and value.is_floating_point():
        wide = value.detach().double()
        mean, std = float(wide.mean()), float(wide.std(correction=0))
        known = {"mean": mean, "std": std} if mean - mean == std - std == 0 else {}
        like = {"mean": 0.0, "std": 1.0, **known}
        return {"kind": "random", **described(value), "seed": _seed(name), **like}
    return {"kind": "tensor", **store.put(value)}


def _not_storable(value: Any) -> Entry:
    return {"kind": "none", "type": f"{type(value).__module__}.{type(value).__qualname__}"}


def _seed(name: str) -> int:
    return zlib.crc32(name.encode())


def attributes(graph_module: GraphModule) -> dict[str, Tensor]:
    """Return the tensors that the graph, and the graphs it calls, read as attributes."""
    found: dict[str, Tensor] = {}
    for node in graph_module.graph.find_nodes(op="get_attr"):
        value: Any = graph_module
        for part in str(node.target).split("."):
            value = getattr(value, part, None)
        if isinstance(value, Tensor):
            found[str(node.target)] = value
    for name, child in graph_module.named_children():
        if isinstance(child, GraphModule):
            found.update({f"{name}.{inner}": v for inner, v in attributes(child).items()})
    return found


def write_inputs(
    path: Path, inputs: Mapping[str, Entry], own: Mapping[str, Entry], store: TensorStore
) -> None:
    """Write the JSON file: where the tensors are, and inputs and attributes, one a line.

    Autocast is noted as it is now: a graph does not say that it runs under it.
    """
    place = Path(os.path.relpath(store.folder, path.parent)).as_posix()
    devices = {entry["device"].split(":")[0] for entry in inputs.values() if "device" in entry}
    autocast = {
        device: str(torch.get_autocast_dtype(device)).removeprefix("torch.")
        for device in sorted(devices - {"meta"})
        if torch.is_autocast_enabled(device)
    }
    parts = [f'"tensors": {json.dumps(place)}', f'"autocast": {json.dumps(autocast)}']
    for title, entries in (("inputs", inputs), ("attributes", own)):
        lines = (f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items())
        parts.append(f'"{title}": {{\n' + ",\n".join(lines) + "\n}")
    write_atomically(path, ("{\n" + ",\n".join(parts) + "\n}\n").encode())


def read_inputs(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the inputs and the attributes that ``write_inputs`` described, by name.

    Raises:
        ConfigError: if the file or one of its tensors is missing, or a value could not be stored.
    """
    content = _content(path)
    store = TensorStore(path.parent / content["tensors"])
    inputs = {name: _value(name, entry, store) for name, entry in content["inputs"].items()}
    own = {name: _value(name, entry, store) for name, entry in content["attributes"].items()}
    return inputs, own


@contextmanager
def ambient(path: Path) -> Iterator[None]:
    """Run what is inside as the graph was run: without gradients, and under its autocast.

    Raises:
        ConfigError: if the file is missing.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for device, dtype in _content(path)["autocast"].items():
            stack.enter_context(torch.autocast(device, dtype_named(dtype)))
        yield


def _content(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path} is missing; a dumped graph runs beside its file of inputs")
    content = json.loads(path.read_text("utf-8"))
    assert isinstance(content, dict)
    return content


def _value(name: str, entry: Entry, store: TensorStore) -> Any:
    if entry["kind"] == "number":
        return entry["value"]
    if entry["kind"] == "tensor":
        return store.get(entry)
    if entry["kind"] == "random":
        return _random(entry)
    raise ConfigError(f"input {name} is a {entry['type']}, which dumps cannot hold")


def _random(entry: Entry) -> Tensor:
    """Make the same numbers every time; what is not floating point, is zero."""
    dtype, extent = dtype_named(entry["dtype"]), memory_extent(entry["shape"], entry["stride"])
    values = torch.zeros(extent)
    if dtype.is_floating_point:
        generator = torch.Generator().manual_seed(entry["seed"])
        values = torch.randn(extent, generator=generator) * entry["std"] + entry["mean"]
    device = "cpu" if entry["device"] == "meta" else entry["device"]
    return values.to(device, dtype).as_strided(entry["shape"], entry["stride"])
