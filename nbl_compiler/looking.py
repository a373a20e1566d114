"""What every observer of a pass over text does: it chooses rows, looks, and says what it saw."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from torch.fx import GraphModule

from nbl_compiler.rows import RowChooser

Seen = TypeVar("Seen", covariant=True)


class Looking(ABC, Generic[Seen]):
    """An observer; ``backend`` is a Dynamo backend.

    Args:
        rows: Which rows of a batch count.
    """

    def __init__(self, rows: RowChooser) -> None:
        self._rows = rows

    @property
    def batch_tokens(self) -> int:
        """Number of tokens of the last batch that counted."""
        return self._rows.tokens

    def start_batch(self, inputs: Mapping[str, Any], *, recoded: bool = False) -> None:
        """Take note of a batch before the model runs it (``RowChooser.start_batch``)."""
        self._rows.start_batch(inputs, recoded=recoded)

    @abstractmethod
    def backend(
        self, graph_module: GraphModule, example_inputs: Sequence[Any]
    ) -> Callable[..., Any]:
        """Look at every matched site and run the graph as it is."""

    @abstractmethod
    def finish(self) -> Seen:
        """Return everything seen."""

    @abstractmethod
    def release(self) -> None:
        """Let go of everything: whatever else holds this observer must not hold it."""
