"""``options={"dump_dir": ...}``: what every pass did to every compiled graph, as files.

dump_dir/graph_000/00.dynamo.py                 as Dynamo traced it; every .py runs on its own
dump_dir/graph_000/03.linearize_attention.before.py
dump_dir/graph_000/03.linearize_attention.after.py
dump_dir/graph_000/03.linearize_attention.diff  between the two, if the pass changed anything
dump_dir/graph_000/inputs.json                  what the files are run on
dump_dir/graph_000/summary.md                   one page: passes, times, sites, reasons
dump_dir/tensors/                               weights and plan's tensors, shared by all graphs
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import unified_diff
from os import PathLike
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from nbl_compiler.dumps.compile_reason import compile_reason, compiled_code
from nbl_compiler.dumps.inputs import Entry, attributes, describe, write_inputs
from nbl_compiler.dumps.source import as_file, class_source, without_frees
from nbl_compiler.dumps.tensor_store import FOLDER, TensorStore
from nbl_compiler.errors import ConfigError
from nbl_compiler.passes.lifting import lifted_tensors
from nbl_compiler.passes.pipeline import PassRun
from nbl_compiler.plan_file import write_atomically

INPUTS = "inputs.json"
TRACED = "00.dynamo.py"
_WEIGHTS = {
    "real": "inputs, weights and plan's tensors as they were",
    "random": "weights are random (dump_inputs='random'); inputs and plan's tensors as they were",
}


class DumpFolder:
    """One compiled graph's folder, the next free number below ``root``.

    Args:
        root: Folder of all dumps; made if missing.
        plan_digest: Digest of the plan that is applied, if one is.
        inputs: ``"real"`` or ``"random"`` weights.

    Raises:
        ConfigError: if ``root`` cannot be written.
    """

    def __init__(
        self, root: str | PathLike[str], plan_digest: str | None, inputs: str = "real"
    ) -> None:
        self._root = Path(root)
        self._digest = plan_digest
        self._random = inputs == "random"
        self._about_inputs = _WEIGHTS[inputs]
        self._why, self._what = compile_reason(), compiled_code()
        self._store = TensorStore(self._root / FOLDER)
        self._runs: list[PassRun] = []
        self._entries: dict[str, Entry] = {}
        self._own: dict[str, Entry] = {}
        self._code = ""
        with self._writing():
            self._root.mkdir(parents=True, exist_ok=True)
            self.folder = _next_folder(self._root)

    def traced(self, graph_module: GraphModule, example_inputs: Sequence[Any]) -> None:
        """Write the graph as Dynamo handed it over, and what it was called with."""
        self._code = class_source(graph_module)
        with self._writing():
            for node, value in zip(_inputs(graph_module), example_inputs, strict=True):
                self._entries[node] = describe(node, value, self._store, self._random)
            self._write_inputs(graph_module)
        self._write(TRACED, ["as Dynamo traced it", f"compiled because: {self._why}"])

    def before(self, index: int, name: str, graph_module: GraphModule) -> None:
        """Write the graph before a pass, which is the graph written last."""
        self._write(f"{index:02d}.{name}.before.py", [f"pass: {name}, before"])

    def after(self, index: int, run: PassRun, graph_module: GraphModule) -> None:
        """Write the graph after a pass, headed by what the pass reported, and what changed."""
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
        before, self._code = self._code, class_source(graph_module)
        with self._writing():
            self._describe_lifted(graph_module)
        stem = f"{index:02d}.{run.name}"
        self._write(f"{stem}.after.py", header)
        old, new = without_frees(before), without_frees(self._code)
        if old != new:
            names = (f"{stem}.before.py", f"{stem}.after.py")
            lines = unified_diff(old, new, *names, lineterm="")
            self._write_text(f"{stem}.diff", "\n".join(lines) + "\n")

    def summary(self, graph_module: GraphModule) -> None:
        """Write the one-page summary."""
        plan = "none" if self._digest is None else f"`{self._digest}`"
        lines = [f"# {self.folder.name}", "", f"plan: {plan}", ""]
        lines += [f"code: {self._what}", "", f"compiled because: {self._why}", ""]
        lines += [f"to run a file: `python {TRACED}` ({self._about_inputs})", ""]
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
        self._write_text("summary.md", "\n".join(lines) + "\n")

    def _describe_lifted(self, graph_module: GraphModule) -> None:
        """Note the plan's tensors that a pass brought into the graph."""
        lifted = lifted_tensors(graph_module)
        names = _inputs(graph_module)
        new = [(n, t) for n, t in zip(names[len(names) - len(lifted) :], lifted, strict=True)]
        new = [(name, tensor) for name, tensor in new if name not in self._entries]
        for name, tensor in new:
            self._entries[name] = describe(name, tensor, self._store)
        if new or attributes(graph_module).keys() - self._own.keys():
            self._write_inputs(graph_module)

    def _write_inputs(self, graph_module: GraphModule) -> None:
        for name, tensor in attributes(graph_module).items():
            self._own.setdefault(name, describe(name, tensor, self._store, self._random))
        write_inputs(self.folder / INPUTS, self._entries, self._own, self._store)

    def _write(self, name: str, header: list[str]) -> None:
        more = f"run on {INPUTS}: {self._about_inputs}"
        self._write_text(name, as_file(self._code, [*header, more], INPUTS))

    def _write_text(self, name: str, text: str) -> None:
        with self._writing():
            write_atomically(self.folder / name, text.encode())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"dump_dir {self._root} cannot be written: {error.strerror}"
            ) from error


def _inputs(graph_module: GraphModule) -> list[str]:
    return [str(node.target) for node in graph_module.graph.find_nodes(op="placeholder")]


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
