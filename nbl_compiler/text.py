"""Text for calibration and evaluation: local files, hub datasets, or what every Python has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nbl_compiler.errors import ConfigError

PYTHON_DOCS = "python-docs"


@dataclass(frozen=True)
class TextSource:
    """Where text comes from.

    Args:
        name: A local ``.txt``, ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file, a dataset on
            the hub (``org/name`` or ``org/name:configuration``), or ``"python-docs"``: the standard
            library's ``pydoc_data.topics``, which every Python has.
        split: Split of a hub dataset.
        column: Column that holds the text.
    """

    name: str
    split: str = "train"
    column: str = "text"

    def documents(self) -> Iterator[str]:
        """Yield the documents that hold any text.

        Raises:
            ConfigError: if the file does not exist or has no such column.
        """
        if self.name == PYTHON_DOCS:
            yield from _python_docs()
            return
        path = Path(self.name)
        if path.suffix == ".txt":
            if not path.is_file():
                raise ConfigError(f"no text file at {path}")
            yield path.read_text(encoding="utf-8")
            return
        for row in self._rows(path):
            if self.column not in row:
                raise ConfigError(
                    f"{self.name} has no column {self.column!r}; it has {', '.join(row)}"
                )
            if row[self.column]:
                yield row[self.column]

    def _rows(self, path: Path) -> Iterable[dict[str, Any]]:
        import datasets

        loaders = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
        if path.suffix in loaders:
            if not path.is_file():
                raise ConfigError(f"no data file at {path}")
            datasets.disable_progress_bars()
            files = {"train": str(path)}
            return datasets.load_dataset(loaders[path.suffix], data_files=files, split="train")  # type: ignore[no-any-return]
        name, _, configuration = self.name.partition(":")
        return datasets.load_dataset(name, configuration or None, split=self.split, streaming=True)  # type: ignore[no-any-return]


def _python_docs() -> Iterator[str]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]


def python_docs_parts() -> tuple[list[str], list[str]]:
    """Return the standard library's help topics as (calibration, held-out) documents.

    Every fourth topic is held out, so both parts cover the same subjects and share no document.
    """
    documents = list(_python_docs())
    held = documents[::4]
    return [d for i, d in enumerate(documents) if i % 4], held


def token_batches(
    documents: Iterable[str],
    tokenizer: Any,
    *,
    tokens: int,
    length: int = 512,
    batch: int = 4,
) -> list[Tensor]:
    """Pack documents into full rows of token ids.

    A document that is longer than a row fills rows of its own, so that most rows are one coherent
    context; what is left of the documents is packed together, each with the tokenizer's own special
    tokens. Every row opens with the BOS token where there is one: models that were trained so
    behave in another way without it (their attention sinks into it), which must not enter the fit.
    A last, shorter row is kept only if there is no full one.

    Args:
        documents: Any iterable of texts; read only as far as needed.
        tokenizer: A transformers tokenizer.
        tokens: Number of tokens wanted, at most.
        length: Tokens a row, T.
        batch: Rows a batch, B.

    Returns:
        Tensors of ids [B, T] (the last may have fewer rows).

    Raises:
        ConfigError: if the documents hold no text.
    """
    wanted = max(tokens // length, 1)
    rows: list[list[int]] = []
    left: list[int] = []  # what remains of documents
    for document in documents:
        own = opened_rows(tokenizer(document, truncation=False)["input_ids"], tokenizer, length)
        rows += [row for row in own if len(row) == length]
        left += own[-1] if own and len(own[-1]) < length else []
        packed = opened_rows(left, tokenizer, length)
        rows += [row for row in packed if len(row) == length]
        left = packed[-1] if packed and len(packed[-1]) < length else []
        if len(rows) >= wanted:
            break
    if not rows and not left:
        raise ConfigError("the text is empty")
    if not rows or tokens < length:
        return [torch.tensor([(rows or [left])[0][:tokens]])]
    return list(torch.tensor(rows[:wanted]).split(batch))


def opened_rows(ids: Sequence[int], tokenizer: Any, length: int) -> list[list[int]]:
    """Cut token ids into rows of at most ``length`` tokens that all open with BOS, if it exists.

    A BOS that stands at the cut already is not doubled.
    """
    bos = tokenizer.bos_token_id
    rows: list[list[int]] = []
    start = 0
    while start < len(ids):
        opening = [] if bos is None or ids[start] == bos else [bos]
        end = start + length - len(opening)
        rows.append([*opening, *ids[start:end]])
        start = end
    return rows
