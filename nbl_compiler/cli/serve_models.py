"""``nbl export``: a plan for a serving engine."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from nbl_compiler.cli.shared import Json, Model, PlanFile, console, print_json


def export(
    model: Model,
    plan: PlanFile,
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    strip: Annotated[
        bool, typer.Option("--strip", help="Leave out weights that no layer reads any more.")
    ] = False,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy the weights instead of linking them.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a folder of a model and its plan that vLLM serves: ``vllm serve OUT``."""
    from nbl_compiler.plans import Plan
    from nbl_compiler.serving.export import export as run

    result = run(model, Plan.load(plan), out, strip=strip, copy=copy)
    if as_json:
        print_json(asdict(result))
    else:
        console.print(str(result), highlight=False, markup=False, soft_wrap=True)
