"""The quality axis: perplexity, divergence and agreement of decoders, cosine of embeddings."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.contenders import Contender, Made
from bench.footprint import held_bytes, weight_bytes_read
from bench.ratios import exact
from bench.results import Row
from bench.running import for_quality
from bench.subjects import Subject, inputs_of
from nbl_compiler.evaluation.bootstrap import estimate
from nbl_compiler.evaluation.token_losses import token_losses

LARGEST_LOSS = 700.0
"""exp of more is no float."""


def measure(contender: Contender, subject: Subject, fraction: float) -> Row:
    """Return one row of a decoder on text that calibration never saw, rows of 512 tokens.

    Args:
        contender: Who.
        subject: With ``rows`` of ids [1, T].
        fraction: How much it replaces.

    Raises:
        DoesNotApply, NBLError: as making the contender does.
    """
    made = contender.made(subject, fraction)
    torch._dynamo.reset()  # compiled code of former plans would hold all of them in memory
    losses = token_losses(subject.model, for_quality(made), subject.rows, progress=False)
    dense, own = float(losses.dense.mean()), float(losses.nbl.mean())
    sums = losses.sums(torch.arange(len(subject.rows)))
    interval = estimate(sums, lambda t: ((t[..., 1] - t[..., 0]) / t[..., 4]).exp())
    ratio = math.exp(min(own - dense, LARGEST_LOSS))
    return {
        **facts(contender, subject, fraction, made),
        "tokens": losses.dense.numel(),
        "perplexity": math.exp(min(own, LARGEST_LOSS)),
        "dense_perplexity": math.exp(dense),
        "interval": [interval.low, interval.high],
        "kl": float(losses.divergence.mean()),
        "top1": float(losses.agrees.mean()),
        "ratios": {"perplexity": exact(ratio, "lower"), **_bytes_ratio(made, subject)},
    }


def measure_embeddings(contender: Contender, subject: Subject, fraction: float) -> Row:
    """Return one row of an encoder: cosine with the dense model's mean-pooled embeddings."""
    made = contender.made(subject, fraction)
    torch._dynamo.reset()
    run = for_quality(made)
    cosine = F.cosine_similarity(_embed(subject.model, subject), _embed(run, subject))
    return {
        **facts(contender, subject, fraction, made),
        "texts": len(cosine),
        "cosine": float(cosine.mean()),
        "least_cosine": float(cosine.min()),
        "ratios": {"cosine": exact(float(cosine.mean()), "higher"), **_bytes_ratio(made, subject)},
    }


def facts(contender: Contender, subject: Subject, fraction: float, made: Made) -> Row:
    """Return what every row of quality says."""
    example = {key: value[:1] for key, value in inputs_of(subject.rows[0]).items()}
    return {
        **names(contender, subject, fraction),
        "calibration_seconds": made.calibration_seconds,
        "weight_bytes_per_token": weight_bytes_read(made),
        "resident_bytes": held_bytes(made, **example),
    }


def names(contender: Contender, subject: Subject, fraction: float) -> Row:
    """Return what a row of quality is about."""
    return {
        "kind": "quality",
        "model": subject.name,
        "contender": contender.name,
        "family": contender.family,
        "origin": contender.origin,
        "fraction": fraction,
    }


def _bytes_ratio(made: Made, subject: Subject) -> dict[str, Any]:
    read = weight_bytes_read(made) / weight_bytes_read(Made(subject.model))
    return {"weight bytes": exact(read, "lower")}


def _embed(forward: Any, subject: Subject) -> Tensor:
    """Return the mean over real tokens of the last hidden state, a row a text."""
    rows = []
    with torch.no_grad():
        for given in subject.rows:
            hidden = forward(**given).last_hidden_state
            mask = given["attention_mask"][..., None].to(hidden.dtype)
            rows.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.cat(rows)
