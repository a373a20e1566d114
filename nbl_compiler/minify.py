"""``nbl minify``: the smallest part of a dumped graph that still fails its numeric check."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from nbl_compiler.dumps.compare import largest_error, tolerance_for
from nbl_compiler.dumps.failure import NOT_RUNNABLE, Check, Failure
from nbl_compiler.dumps.folder import INPUTS, TRACED
from nbl_compiler.dumps.inputs import ambient, attributes, describe, write_inputs
from nbl_compiler.dumps.parse import load_graph
from nbl_compiler.dumps.source import as_file, class_source
from nbl_compiler.dumps.tensor_store import FOLDER, TensorStore
from nbl_compiler.dumps.values import NodeValues
from nbl_compiler.errors import ConfigError, NBLError
from nbl_compiler.lowering.lower import LOWERINGS
from nbl_compiler.minify_graph import Checker, count_calls, shrink
from nbl_compiler.plan_file import write_atomically

MINIFIED = "minified.py"
_MINIFIED_INPUTS = "minified.json"
# Passes after which a graph computes what it did before, but for rounding.
EXACT_PASSES = ("canonicalize", "match_attention", "match_ffn", "clean_up", "stream_products")

_AROUND = ("before", "after")


@dataclass(frozen=True)
class InexactPass:
    """A pass that should be exact and changes what the graph computes.

    Args:
        name: Number and name, such as ``07.clean_up``.
        error: Largest relative error of an output.
        node: The first node of that name in both graphs whose value differs, if there is one.
    """

    name: str
    error: float
    node: str | None

    def __str__(self) -> str:
        where = "" if self.node is None else f", first at {self.node}"
        text = f"pass {self.name} should be exact, and changes the outputs"
        return f"{text}: relative error {self.error:.2e}{where} (see {self.name}.diff)"


@dataclass(frozen=True)
class Minified:
    """What became of one graph.

    Args:
        file: The dumped file that was checked.
        failure: What is wrong with it, or None.
        nodes: Its number of calls, before and after.
        written: The smallest graph that fails, as a file, or None.
        failing_passes: Passes that should be exact and change what the graph computes.
    """

    file: Path
    failure: Failure | None
    nodes: tuple[int, int]
    written: Path | None
    failing_passes: tuple[InexactPass, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the result as plain values."""
        failure = self.failure
        return {
            "file": str(self.file),
            "failure": None if failure is None else failure.kind,
            "text": "nothing fails" if failure is None else failure.text,
            "calls": self.nodes[0],
            "calls_left": self.nodes[1],
            "written": None if self.written is None else str(self.written),
            "inexact_passes": {f.name: f.error for f in self.failing_passes},
        }

    def __str__(self) -> str:
        lines = [f"{self.file.parent.name}: {found}" for found in self.failing_passes]
        where = f"{self.file.parent.name}/{self.file.name}"
        if self.failure is None:
            lines.append(f"{where}: nothing fails")
        else:
            before, after = self.nodes
            lines.append(f"{where}: {self.failure.text}")
            lines.append(f"{before} calls, {after} left: {self.written}")
        return "\n".join(lines)


def minify(
    dump: Path,
    lowering: str = "aot_eager",
    tolerance: float | None = None,
    check: Checker | None = None,
    progress: bool = False,
) -> list[Minified]:
    """Check dumped graphs, and cut the first that fails down to the part that does.

    Args:
        dump: A dumped file, the folder of a graph (its graph after all passes is checked), or the
            folder of all dumps (its graphs are checked in turn).
        lowering: What is compared with the graph run eagerly, ``"aot_eager"`` or ``"inductor"``.
        tolerance: Largest relative error that counts as rounding; by default by the dtype.
        check: Another check, in place of these; it returns what is wrong, or None.
        progress: Show a progress bar.

    Returns:
        One result a graph, up to the first that fails; its smallest failing part is written beside
        it, to ``minified.py``.

    Raises:
        ConfigError: if there is no dump, it cannot be run, or the lowering is none.
    """
    if lowering not in LOWERINGS or lowering == "eager":
        raise ConfigError(f"lowering={lowering!r} must be aot_eager or inductor")
    results = []
    for file in _files(Path(dump)):
        with ambient(_inputs_of(file)):
            results.append(_minify(file, lowering, tolerance, check, progress))
        if results[-1].failure is not None or results[-1].failing_passes:
            break
    return results


def _files(dump: Path) -> list[Path]:
    """Return the files to check."""
    if dump.is_file():
        return [dump]
    graphs = sorted(dump.glob("graph_*")) or [dump]
    files = [(sorted(g.glob("*.after.py")) or sorted(g.glob(TRACED)))[-1:] for g in graphs]
    found = [file for some in files for file in some]
    if not found:
        raise ConfigError(
            f"{dump} is no dump; write one with options={{'dump_dir': ...}} or NBL_DUMP=folder"
        )
    return found


def _inputs_of(file: Path) -> Path:
    return file.with_name(_MINIFIED_INPUTS if file.name == MINIFIED else INPUTS)


def _minify(
    file: Path, lowering: str, tolerance: float | None, check: Checker | None, progress: bool
) -> Minified:
    graph_module, inputs = load_graph(file, _inputs_of(file))
    try:
        values = NodeValues.on(graph_module, inputs).noted.values()
        allowed = tolerance_for(values) if tolerance is None else tolerance
        passes = () if check is not None else _inexact_passes(file, allowed)
        check = check or Check(lowering, allowed)
        failure = check(graph_module, inputs)
    except NBLError:
        raise
    except NOT_RUNNABLE as error:
        raise ConfigError(f"{file} cannot be run: {type(error).__name__}: {error}") from error
    before = count_calls(graph_module)
    if failure is None:
        return Minified(file, None, (before, before), None, passes)
    smallest, left = shrink(graph_module, inputs, check, failure.kind, progress)
    failure_left = check(smallest, left) or failure
    written = _write(file, smallest, left, failure_left, lowering)
    return Minified(file, failure, (before, count_calls(smallest)), written, passes)


def _inexact_passes(file: Path, tolerance: float) -> tuple[InexactPass, ...]:
    """Return the exact passes up to this file that change what the graph computes."""
    found = []
    for after in sorted(file.parent.glob("*.after.py")):
        named = re.fullmatch(r"(\d+\.(\w+))\.after\.py", after.name)
        if named is None or named[2] not in EXACT_PASSES or after.name > file.name:
            continue
        if not after.with_name(f"{named[1]}.diff").exists():
            continue
        try:
            old, new = (_values_of(file.with_name(f"{named[1]}.{s}.py")) for s in _AROUND)
        except NOT_RUNNABLE:  # a graph that still holds nbl::absent_kv raises on purpose
            continue
        error = largest_error(old.returned, new.returned)
        if error > tolerance:
            differing = (n for n in new.noted if n in old.noted)
            first = (n for n in differing if largest_error(old.noted[n], new.noted[n]) > tolerance)
            found.append(InexactPass(named[1], error, next(first, None)))
    return tuple(found)


def _values_of(file: Path) -> NodeValues:
    return NodeValues.on(*load_graph(file, file.with_name(INPUTS)))


def _write(
    file: Path, graph_module: GraphModule, inputs: Sequence[Any], failure: Failure, lowering: str
) -> Path:
    """Write a graph and its inputs beside the file that it comes from."""
    values = NodeValues.on(graph_module, inputs).noted
    for node in graph_module.graph.nodes:
        node.meta["example_value"] = values[node.name]  # so that the file shows dtypes and shapes
    store = TensorStore(file.parent.parent / FOLDER)
    names = [str(node.target) for node in graph_module.graph.find_nodes(op="placeholder")]
    entries = {n: describe(n, v, store) for n, v in zip(names, inputs, strict=True)}
    own = {name: describe(name, value, store) for name, value in attributes(graph_module).items()}
    write_inputs(file.with_name(_MINIFIED_INPUTS), entries, own, store)
    header = [f"the smallest part of {file.name} that fails", f"fails: {failure.text}"]
    text = as_file(class_source(graph_module), header, _MINIFIED_INPUTS, lowering)
    target = file.with_name(MINIFIED)
    write_atomically(target, text.encode())
    return target
