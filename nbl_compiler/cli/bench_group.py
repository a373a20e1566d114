"""``nbl bench MODEL PLAN``, and ``nbl bench compare A.json B.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from nbl_compiler.cli.judge_plans import bench
from nbl_compiler.cli.shared import Json, console, print_json, share


class MeasuresByDefault(TyperGroup):
    """``nbl bench MODEL PLAN`` is short for ``nbl bench run MODEL PLAN``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put ``run`` in front where no command is named."""
        if args and args[0] not in {*self.commands, "--help"}:
            args = ["run", *args]
        return super().parse_args(ctx, args)


def compare(
    before: Annotated[Path, typer.Argument(help="Result file of the benchmark.")],
    after: Annotated[Path, typer.Argument(help="Another one.")],
    tolerance: Annotated[str, typer.Option(help="Relative changes to ignore.")] = "2%",
    everything: Annotated[bool, typer.Option("--all", help="Also what did not change.")] = False,
    as_json: Json = False,
) -> None:
    """Compare two result files by their ratios; status 1 if something got worse."""
    from nbl_compiler.bench_compare import compare as run

    ignored = share(tolerance)
    assert ignored is not None
    found = run(before, after, ignored)
    if as_json:
        print_json(found.as_json())
    else:
        for note in found.notes:
            console.print(note, highlight=False, markup=False)
        if everything or any(change.verdict != "same" for change in found.changes):
            console.print(found.table(everything), highlight=False, markup=False)
        console.print(found.summary(), highlight=False, markup=False)
    if found.regressions:
        raise typer.Exit(1)


bench_app = typer.Typer(
    cls=MeasuresByDefault,
    no_args_is_help=True,
    help="Time a plan (nbl bench MODEL PLAN), or compare two result files of the benchmark.",
)
bench_app.command("run")(bench)
bench_app.command("compare")(compare)
