"""Calibration says so when rows were cut out of text without their BOS token."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from nbl_compiler.errors import NBLWarning
from nbl_compiler.row_openings import RowOpenings

BOS = 7


def openings(*batches: dict[str, Tensor], bos: int | None = BOS) -> RowOpenings:
    model = nn.Module()
    model.config = SimpleNamespace(bos_token_id=bos)  # type: ignore[assignment]
    counted = RowOpenings(model)
    for batch in batches:
        counted.add(batch)
    return counted


def rows(*first: int, padding: int = 0) -> dict[str, Tensor]:
    ids = torch.tensor([[0] * padding + [token, 1, 2] for token in first])
    mask = torch.ones_like(ids)
    mask[:, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask} if padding else {"input_ids": ids}


def test_some_rows_without_bos_are_counted() -> None:
    with pytest.warns(NBLWarning, match="2 of 3 calibration rows do not open with the BOS"):
        openings(rows(BOS, 3), rows(4)).warn()


@pytest.mark.parametrize(
    "batch",
    [
        rows(BOS, BOS),
        rows(3, 4),  # a model's user who never gives BOS
        rows(BOS, padding=2),
        {"inputs_embeds": torch.zeros(1, 3, 4)},
    ],
    ids=["all", "none", "left padding", "no ids"],
)
def test_rows_that_are_alike_say_nothing(batch: dict[str, Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        openings(batch).warn()
        openings(rows(BOS, 3), bos=None).warn()


def test_padding_in_front_is_passed_over() -> None:
    with pytest.warns(NBLWarning, match="1 of 2"):
        openings(rows(BOS, 3, padding=4)).warn()
