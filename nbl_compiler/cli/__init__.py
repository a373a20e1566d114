"""The command line, ``nbl``."""

from __future__ import annotations

import sys

import typer

from nbl_compiler.cli.judge_plans import bench, evaluate, explain
from nbl_compiler.cli.make_plans import calibrate, plan_for_budget, refit
from nbl_compiler.cli.run_models import demo, generate, minify
from nbl_compiler.cli.serve_models import export
from nbl_compiler.errors import NBLError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make a pretrained transformer faster without fine-tuning it.",
)
app.command("calibrate")(calibrate)
app.command("plan")(plan_for_budget)
app.command("refit")(refit)
app.command("explain")(explain)
app.command("eval")(evaluate)
app.command("bench")(bench)
app.command("generate")(generate)
app.command("demo")(demo)
app.command("export")(export)
app.command("minify")(minify)


def main() -> None:
    """Run the command line; a user's mistake ends in one line on stderr and status 1."""
    try:
        app()
    except (NBLError, FileNotFoundError) as error:
        sys.stderr.write(f"nbl: {error}\n")
        sys.exit(1)
