"""Matrix products that mean what they say, whatever precision the user has chosen for the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Keep TF32, bfloat16 products and autocast out of float32 products on ``device``."""
    # torch's stubs do not know mkldnn.matmul.
    matmuls = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [matmul.fp32_precision for matmul in matmuls]
    try:
        for matmul in matmuls:
            matmul.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for matmul, precision in zip(matmuls, before, strict=True):
            matmul.fp32_precision = precision
