"""MiniLM's sentence embeddings as a subject."""

from __future__ import annotations

import argparse

import embedding_quality

from bench.subjects import Subject, documents
from nbl_compiler.models import MINILM, resolve

TEXTS, EVAL_TEXTS = 192, 64
"""Sentences to calibrate on (26 thousand tokens of C4), and to judge by."""


def encoder(args: argparse.Namespace) -> Subject:
    """Return MiniLM-L6 with padded batches of sentences."""
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    path = resolve(MINILM)
    model, tokenizer = AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    known, unseen = documents(args)
    texts = embedding_quality.sentences(known, TEXTS)
    pool = embedding_quality.sentences(unseen, TEXTS + EVAL_TEXTS)
    held_out = [text for text in pool if text not in set(texts)][:EVAL_TEXTS]
    return Subject(
        MINILM,
        model,
        embedding_quality.batches(texts, tokenizer),
        embedding_quality.batches(held_out, tokenizer),
    )
