"""What attention does with its weights, seen in the graph: whatever its scale, in any spelling."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbl_compiler.lowering.mixed_values import bucket_masses
from nbl_compiler.observe_gates import GateObserver

HEADS, SIZE, LENGTH = 3, 4, 24
WIDTH = HEADS * SIZE
# Float32: a softmax, and running sums of weights up to 1.
ROUNDING = 1e-6


class Attention(nn.Module):
    """Causal attention by SDPA, or spelled out.

    Args:
        scale: Of the scores; None for the usual one.
        fused: Whether SDPA does it.
    """

    def __init__(self, scale: float | None, fused: bool) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.scale, self.fused = scale, fused

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            project(x).unflatten(-1, (HEADS, SIZE)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        if self.fused:
            mixed = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=self.scale
            )
        else:
            mixed = self.weights(query, key) @ value
        made: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return made

    def weights(self, query: Tensor, key: Tensor) -> Tensor:
        """Return [B, heads, T, T]."""
        scale = SIZE**-0.5 if self.scale is None else self.scale
        length = query.shape[2]
        later = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
        mask = torch.zeros(1, 1, length, length).masked_fill(later, torch.finfo(torch.float32).min)
        return (query @ key.transpose(2, 3) * scale + mask).softmax(-1)


class Model(nn.Module):
    """A residual block."""

    def __init__(self, scale: float | None, fused: bool) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), Attention(scale, fused)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm(x))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("scale", [None, 0.3, 1, 2])
def test_masses_are_those_of_the_models_own_weights(scale: float | None, fused: bool) -> None:
    torch.manual_seed(0)
    model = Model(scale, fused).eval()
    x = torch.randn(2, LENGTH, WIDTH) * 3
    observer = GateObserver(0.0, 0)
    observer.start_batch({"x": x})
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=observer.backend)(x)
        normed = model.norm(x)
        query, key = (
            project(normed).unflatten(-1, (HEADS, SIZE)).transpose(1, 2)
            for project in (model.attention.query, model.attention.key)
        )
        weights = model.attention.weights(query, key)
    ((site, (train, held)),) = observer.finish().items()
    assert site == "attention"
    assert len(held.x) == 0
    expected = bucket_masses(weights, torch.arange(1, LENGTH + 1).unsqueeze(0))
    torch.testing.assert_close(train.masses, expected.flatten(0, 1), rtol=0, atol=ROUNDING)
    assert train.masses.std() > 0.1
    assert torch.equal(train.x, normed.flatten(0, 1).bfloat16())
