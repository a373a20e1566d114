"""The command line, ``nbl``."""

from __future__ import annotations

import logging
import sys

import typer

from nbl_compiler.cli.bench_group import bench_app
from nbl_compiler.cli.job import own_rank, processes, refuse_job
from nbl_compiler.cli.judge_plans import evaluate, explain
from nbl_compiler.cli.make_plans import calibrate, plan_for_budget, refit
from nbl_compiler.cli.run_models import demo, generate, minify
from nbl_compiler.cli.serve_models import export
from nbl_compiler.errors import NBLError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def check_processes(context: typer.Context) -> None:
    """Make a pretrained transformer faster without fine-tuning it."""
    command = context.invoked_subcommand
    if command is not None and command != "calibrate":
        refuse_job(command)


app.command("calibrate")(calibrate)
app.command("plan")(plan_for_budget)
app.command("refit")(refit)
app.command("explain")(explain)
app.command("eval")(evaluate)
app.add_typer(bench_app, name="bench")
app.command("generate")(generate)
app.command("demo")(demo)
app.command("export")(export)
app.command("minify")(minify)


# transformers imports torchao where it is installed, which warns of kernels for other machines.
_NOISY = ("torchao", "torch.utils._pytree")


def main() -> None:
    """Run the command line; a user's mistake ends in one line on stderr and status 1.

    In a job that is one line, too, if all processes know which one failed.
    """
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        app()
    except (NBLError, FileNotFoundError) as error:
        teller = getattr(error, "told_by", None)
        if teller is None and processes() > 1:
            sys.stderr.write(f"nbl: process {own_rank()}: {error}\n")
        elif teller in (None, own_rank()):
            sys.stderr.write(f"nbl: {error}\n")
        sys.exit(1)
