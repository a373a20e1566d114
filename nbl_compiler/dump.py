"""``options={"dump_dir": ...}``: what every pass did to every compiled graph, as files.

dump_dir/graph_000/00.dynamo.py                 as Dynamo traced it
dump_dir/graph_000/03.linearize_attention.before.py
dump_dir/graph_000/03.linearize_attention.after.py
dump_dir/graph_000/summary.md                   one page: passes, times, sites, reasons
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from torch.fx import GraphModule

from nbl_compiler.errors import ConfigError
from nbl_compiler.passes.pipeline import PassRun


class DumpFolder:
    """One compiled graph's folder, the next free number below ``root``.

    Args:
        root: Folder of all dumps; made if missing.
        plan_digest: Digest of the plan that is applied, if one is.

    Raises:
        ConfigError: if ``root`` cannot be written.
    """

    def __init__(self, root: str | PathLike[str], plan_digest: str | None) -> None:
        parent = Path(root)
        try:
            parent.mkdir(parents=True, exist_ok=True)
            self.folder = _next_folder(parent)
        except OSError as error:
            raise ConfigError(f"dump_dir {parent} cannot be written: {error.strerror}") from error
        self._digest = plan_digest
        self._runs: list[PassRun] = []

    def traced(self, graph_module: GraphModule) -> None:
        """Write the graph as Dynamo handed it over."""
        self._write("00.dynamo.py", ["as Dynamo traced it"], graph_module)

    def before(self, index: int, name: str, graph_module: GraphModule) -> None:
        """Write the graph before a pass."""
        self._write(f"{index:02d}.{name}.before.py", [f"pass: {name}, before"], graph_module)

    def after(self, index: int, run: PassRun, graph_module: GraphModule) -> None:
        """Write the graph after a pass, headed by what the pass reported."""
        self._runs.append(run)
        report = run.report
        header = [
            f"pass: {run.name}, after",
            f"time: {run.seconds * 1e3:.1f} ms",
            f"matched: {', '.join(report.matched) or '-'}",
            f"rewritten: {', '.join(report.rewritten) or '-'}",
            *(f"left alone: {r.site}: {r.reason}" for r in report.rejected),
            *(f"note: {note}" for note in report.notes),
        ]
        self._write(f"{index:02d}.{run.name}.after.py", header, graph_module)

    def summary(self, graph_module: GraphModule) -> None:
        """Write the one-page summary."""
        plan = "none" if self._digest is None else f"`{self._digest}`"
        lines = [f"# {self.folder.name}", "", f"plan: {plan}", ""]
        lines += ["| pass | ms | matched | rewritten | left alone |", "|---|---|---|---|---|"]
        for run in self._runs:
            r = run.report
            lines.append(
                f"| {run.name} | {run.seconds * 1e3:.1f} | {len(r.matched)} | {len(r.rewritten)} "
                f"| {len(r.rejected)} |"
            )
        lines += ["", f"nodes in the end: {len(graph_module.graph.nodes)}", "", "## Sites", ""]
        for run in self._runs:
            lines += [f"- {run.name}: `{site}` rewritten" for site in run.report.rewritten]
            lines += [
                f"- {run.name}: `{r.site}` left alone: {r.reason} (node `{r.node}`; {r.source})"
                for r in run.report.rejected
            ]
        (self.folder / "summary.md").write_text("\n".join(lines) + "\n", "utf-8")

    def _write(self, name: str, header: list[str], graph_module: GraphModule) -> None:
        code = graph_module.print_readable(print_output=False)
        text = "".join(f"# {line}\n" for line in header) + code
        (self.folder / name).write_text(text, "utf-8")


def _next_folder(parent: Path) -> Path:
    """Make and return the next ``graph_<number>`` folder; processes may share ``parent``."""
    number = len(list(parent.glob("graph_*")))
    while True:
        folder = parent / f"graph_{number:03d}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder
