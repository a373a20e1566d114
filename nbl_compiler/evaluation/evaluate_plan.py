"""``nbl eval``: what a plan costs, on text that calibration never saw."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from nbl_compiler.errors import ConfigError
from nbl_compiler.evaluation.bootstrap import Estimate, estimate
from nbl_compiler.evaluation.dropping import dropping
from nbl_compiler.evaluation.generation import Generation, compare_generation
from nbl_compiler.evaluation.perplexity import Row, perplexity, rows_of_documents
from nbl_compiler.evaluation.tasks import find_tasks, run_tasks
from nbl_compiler.evaluation.token_losses import TokenLosses, token_losses
from nbl_compiler.plans import Plan
from nbl_compiler.text_pass import device_of

# With fewer documents than this an interval over documents means nothing; rows are drawn then.
LEAST_DOCUMENTS = 8
PROMPT_TOKENS = 32


@dataclass(frozen=True)
class AtLength:
    """Quality at one context length.

    Args:
        length: Tokens a row, T.
        tokens: Predicted tokens.
        units: What the intervals are drawn over: so many documents, or rows.
        dense: Perplexity of the dense model.
        nbl: Perplexity under the plan.
        ratio: nbl / dense.
        divergence: Mean KL divergence of the plan's predictions from the dense ones, nats.
        agreement: Share of positions where both find the same token most likely.
        dropped: Perplexity with the same sites dropped, if that was asked for.
    """

    length: int
    tokens: int
    units: str
    dense: float
    nbl: float
    ratio: Estimate
    divergence: Estimate
    agreement: Estimate
    dropped: float | None = None


@dataclass(frozen=True)
class AtPositions:
    """Mean loss of the positions ``first`` to ``last`` of the longest rows, in nats."""

    first: int
    last: int
    dense: float
    nbl: float


@dataclass(frozen=True)
class Evaluation:
    """Everything that was measured.

    Args:
        lengths: One entry a context length, ascending.
        positions: Loss along the longest rows.
        generation: Greedy texts, if they were asked for.
        tasks: Task → metric → (dense, under the plan).
    """

    lengths: tuple[AtLength, ...]
    positions: tuple[AtPositions, ...]
    generation: Generation | None
    tasks: dict[str, dict[str, tuple[float, float]]]

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def tables(self) -> list[Table]:
        """Return tables for a terminal."""
        made = [self._length_table(), self._position_table()]
        if self.generation is not None:
            made.append(_generation_table(self.generation))
        if self.tasks:
            made.append(_task_table(self.tasks))
        return made

    def _length_table(self) -> Table:
        dropped = any(row.dropped is not None for row in self.lengths)
        names = [
            "context", "tokens", "dense", "nbl", "nbl / dense [95 %]", "KL, nats [95 %]",
            "same top token [95 %]", "drawn over", *(["dropped"] if dropped else []),
        ]  # fmt: skip
        table = Table(*names, title="perplexity", title_justify="left")
        for row in self.lengths:
            table.add_row(
                f"{row.length:,}", f"{row.tokens:,}", f"{row.dense:.2f}", f"{row.nbl:.2f}",
                f"{row.ratio:.3f}", f"{row.divergence:.3f}", f"{row.agreement:.3f}", row.units,
                *([] if row.dropped is None else [f"{row.dropped:.2f}"]),
            )  # fmt: skip
        return table

    def _position_table(self) -> Table:
        title = f"loss along rows of {self.lengths[-1].length:,} tokens, nats"
        table = Table("positions", "dense", "nbl", "nbl − dense", title=title, title_justify="left")
        for row in self.positions:
            table.add_row(
                f"{row.first:,} – {row.last:,}", f"{row.dense:.3f}", f"{row.nbl:.3f}",
                f"{row.nbl - row.dense:+.3f}",
            )  # fmt: skip
        return table


def evaluate_plan(
    model: nn.Module,
    tokenizer: Any,
    plan: Plan,
    documents: Iterable[str],
    *,
    tokens: int = 16_384,
    lengths: Sequence[int] = (512,),
    drop: bool = False,
    prompts: int = 0,
    new_tokens: int = 64,
    tasks: Sequence[str] = (),
    task_folder: Path | None = None,
    task_limit: int | None = None,
    lowering: str = "eager",
    progress: bool = False,
) -> Evaluation:
    """Compare a plan with the dense model on the same text.

    Args:
        model: The dense model, a causal LM in eval mode.
        tokenizer: Its tokenizer.
        plan: The plan.
        documents: Text that calibration never saw.
        tokens: Evaluation tokens at each length, at most.
        lengths: Context lengths, tokens a row.
        drop: Also drop the same sites, for comparison.
        prompts: Continue the beginnings of so many rows with both.
        new_tokens: Tokens to add to each prompt.
        tasks: Tasks of lm-evaluation-harness.
        task_folder: Further task files.
        task_limit: Documents a task, at most.
        lowering: As in the backend's options; quality does not depend on it.
        progress: Show bars.

    Raises:
        ConfigError: if the text is shorter than a row, a length is too small, or a task unknown.
    """
    if not lengths or min(lengths) < 2:
        raise ConfigError(f"lengths={tuple(lengths)!r} must name context lengths of at least 2")
    manager = find_tasks(tasks, task_folder) if tasks else None  # a mistake is told before the work
    documents, device = list(documents), device_of(model)
    dense, nbl = (_compiled(model, used, lowering) for used in (Plan(), plan))
    without = _compiled(model, dropping(plan), lowering) if drop else None
    made: list[AtLength] = []
    losses: TokenLosses | None = None
    ids: list[Tensor] = []
    for length in sorted(set(lengths)):
        rows = rows_of_documents(documents, tokenizer, tokens=tokens, length=length)
        ids = [row.ids.to(device) for row in rows]
        losses = token_losses(dense, nbl, ids, progress=progress)
        dropped = None
        if without is not None:
            dropped = perplexity(without, ids, progress=progress).perplexity
        made.append(_at_length(losses, rows, dropped))
    assert losses is not None
    return Evaluation(
        lengths=tuple(made),
        positions=_along(losses),
        generation=_generate(model, nbl, ids, prompts, new_tokens),
        tasks=run_tasks(dense, nbl, tokenizer, tasks, manager, task_limit) if tasks else {},
    )


def _compiled(model: nn.Module, plan: Plan, lowering: str) -> Callable[..., Any]:
    options: dict[str, Any] = {"plan": plan, "lowering": lowering}
    return torch.compile(model, backend="nbl", options=options)


def _at_length(losses: TokenLosses, rows: Sequence[Row], dropped: float | None) -> AtLength:
    documents = torch.tensor([row.document for row in rows])
    by_document = len(documents.unique()) >= LEAST_DOCUMENTS
    sums = losses.sums(documents if by_document else torch.arange(len(rows)))

    def per_token(column: int) -> Callable[[Tensor], Tensor]:
        return lambda totals: totals[..., column] / totals[..., 4]

    def ratio(totals: Tensor) -> Tensor:
        return ((totals[..., 1] - totals[..., 0]) / totals[..., 4]).exp()

    return AtLength(
        length=losses.dense.shape[1] + 1,
        tokens=losses.dense.numel(),
        units=f"{len(sums)} {'documents' if by_document else 'rows'}",
        dense=math.exp(float(losses.dense.mean())),
        nbl=math.exp(min(float(losses.nbl.mean()), 700.0)),
        ratio=estimate(sums, ratio),
        divergence=estimate(sums, per_token(2)),
        agreement=estimate(sums, per_token(3)),
        dropped=dropped,
    )


def _along(losses: TokenLosses) -> tuple[AtPositions, ...]:
    """Split the positions at powers of two: each span has as much context again as the last."""
    end = losses.dense.shape[1]
    edges = [0, *(2**k for k in range(4, end.bit_length()) if 2**k < end), end]
    return tuple(
        AtPositions(
            first + 1, last, float(losses.dense[:, first:last].mean()),
            float(losses.nbl[:, first:last].mean()),
        )
        for first, last in pairwise(edges)
    )  # fmt: skip


def _generate(
    model: nn.Module, nbl: Callable[..., Any], rows: Sequence[Tensor], prompts: int, new_tokens: int
) -> Generation | None:
    if not prompts:
        return None
    beginnings = torch.cat([ids[:, :PROMPT_TOKENS] for ids in rows[:prompts]])
    return compare_generation(model, nbl, beginnings, new_tokens)


def _generation_table(made: Generation) -> Table:
    title = f"{made.prompts} prompts continued greedily by {made.new_tokens} tokens"
    table = Table("", "dense", "nbl", title=title, title_justify="left")
    dense, nbl = made.repeated
    table.add_row("repeated runs of 4 tokens", f"{dense:.1%}", f"{nbl:.1%}")
    table.add_row("leaves the dense text after, median", "", f"{made.parted:.0f} tokens")
    table.add_row("same text to the end", "", f"{made.same:.0%}")
    return table


def _task_table(tasks: dict[str, dict[str, tuple[float, float]]]) -> Table:
    table = Table("task", "metric", "dense", "nbl", title="tasks", title_justify="left")
    for task, metrics in tasks.items():
        for metric, (dense, nbl) in metrics.items():
            table.add_row(task, metric, f"{dense:.4f}", f"{nbl:.4f}")
    return table
