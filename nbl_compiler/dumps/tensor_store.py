"""The tensors of all dumps of one folder, each stored once, under the hash of its bytes.

Weights, and a plan's tensors, are the same for every graph of a model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from nbl_compiler.errors import ConfigError
from nbl_compiler.plan_file import write_atomically

_KEY = "bytes"
FOLDER = "tensors"


class TensorStore:
    """Tensors as files ``<hash>.safetensors`` below one folder.

    Args:
        folder: Where; made when the first tensor is stored.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, tensor: Tensor) -> dict[str, Any]:
        """Store a plain strided tensor and return what ``get`` needs, as JSON.

        What is stored is the stretch of memory that the tensor spans: strides come back as they
        were, and an expanded tensor takes no more space than it did.
        """
        plain = tensor.detach().resolve_conj().resolve_neg()
        extent = memory_extent(plain.shape, plain.stride())
        stretch = plain.as_strided((extent,), (1,), plain.storage_offset())
        data = stretch.view(torch.uint8).cpu()
        name = hashlib.blake2b(data.numpy().data, digest_size=16).hexdigest()
        path = self._path(name)
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, safetensors.torch.save({_KEY: data}))
        return {**described(plain), "data": name}

    def get(self, entry: dict[str, Any]) -> Tensor:
        """Return the tensor of an entry, in memory of its own.

        Raises:
            ConfigError: if its file is gone.
        """
        path = self._path(entry["data"])
        if not path.is_file():
            raise ConfigError(f"{path} is missing; copy a dump together with its folder {FOLDER}")
        data = safetensors.torch.load_file(path)[_KEY].clone()
        stretch = data.view(dtype_named(entry["dtype"])).to(entry["device"])
        return stretch.as_strided(entry["shape"], entry["stride"])

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def described(tensor: Tensor) -> dict[str, Any]:
    """Return dtype, shape, strides and device as JSON, a symbolic size as it was traced."""
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": [traced_number(size) for size in tensor.shape],
        "stride": [traced_number(step) for step in tensor.stride()],
        "device": str(tensor.device),
    }


def traced_number(value: Any) -> Any:
    """Return a number as it was while Dynamo traced; ``int()`` would make Dynamo guard on it."""
    return value.node.hint if isinstance(value, torch.SymInt | torch.SymFloat) else value


def memory_extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Return how many elements lie between a tensor's first and its last, both counted."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))


def dtype_named(name: str) -> torch.dtype:
    """Return the dtype of a name such as ``float32``."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
