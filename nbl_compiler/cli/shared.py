"""The options that commands share, and how their text is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from nbl_compiler.errors import ConfigError

console = Console()

Model = Annotated[str, typer.Argument(help="A folder, a hub id, or gemma-3-270m (packaged).")]
PlanFile = Annotated[Path, typer.Argument(help="Plan file (safetensors).")]
Text = Annotated[
    str, typer.Option(help="A .txt/.jsonl/.csv/.parquet file, a hub data set, or python-docs.")
]
Column = Annotated[str, typer.Option(help="Column of the data set that holds the text.")]
Split = Annotated[str, typer.Option(help="Split of a hub data set.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
Lowering = Annotated[str, typer.Option(help="inductor, aot_eager or eager.")]
GuardTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Guarded FFNs run dense over more tokens at once than this."),
]


def check_folder(file: Path) -> None:
    """Raise before the work starts, rather than when its result cannot be written."""
    if not file.parent.is_dir():
        raise ConfigError(f"the folder {file.parent} does not exist")


def share(text: str | None) -> float | None:
    """Return a share given as ``2%`` or ``0.02``."""
    if text is None:
        return None
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise ConfigError(f"{text!r} is no share: give 2% or 0.02") from None


def layer_names(text: str | None) -> tuple[int | str, ...] | None:
    """Return the layers of a list such as ``3,5`` or of module paths."""
    return tuple(_layer(item) for item in text.split(",")) if text else None


def _layer(item: str) -> int | str:
    text = item.strip()
    return int(text) if text.lstrip("-").isdigit() else text


def ridge_of(text: str) -> Any:
    """Return ``"auto"`` or the number."""
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"--ridge {text!r} is neither 'auto' nor a number") from None


def numbers(text: str) -> list[int]:
    """Return the numbers of a list such as ``512,2048``."""
    try:
        return [int(item) for item in text.split(",") if item.strip()]
    except ValueError:
        raise ConfigError(f"{text!r} is no list of numbers such as 512,2048") from None


def print_json(value: Any) -> None:
    """Print a value for machines."""
    typer.echo(json.dumps(value, indent=2, default=str))
