"""What a site should give, for the compressed residual stream to come back to the dense model's.

A layer adds s = p(y) + o. Where earlier sites were replaced, o differs from the dense model's, by
Δ = o^dense − o^compressed; the stream is back where it was if p(ŷ) = p(y) + Δ. The target is

    t = y + c δ,        p(y + δ) ≈ p(y) + Δ

with the strength c in [0, 1] (c = 0 is the dense output itself). p is a scale per component, or an
RMS norm, as Gemma and OLMo put it behind their blocks:

    p(y) = g ⊙ y             δ = γ ⊙ Δ
    p(y) = g ⊙ y / rms(y)    δ = rms(y) γ ⊙ Δ, without its part along y, which the norm takes out

with γ = g / (g² + μ median g²) in place of 1/g: components that hardly reach the stream are not
blown up, at the cost of those that do.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Components with g² far below this fraction of its median are left alone.
DAMPING = 0.1
# p counts as one of the two forms if they explain all but this part of ‖p‖².
TOLERANCE = 1e-3


def correction(y: Tensor, branch: Tensor, missing: Tensor) -> Tensor | None:
    """Return δ, or None where p is neither a scale nor an RMS norm.

    Args:
        y: The site's dense output, [n, d].
        branch: p(y), [n, d].
        missing: Δ, [n, d].
    """
    y, branch, missing = (rows.float() for rows in (y, branch, missing))
    scale = _scale(y, branch)
    if scale is not None:
        return _damped(scale) * missing
    size = y.square().mean(-1, keepdim=True).sqrt().clamp_min(torch.finfo(y.dtype).tiny)
    direction = y / size
    scale = _scale(direction, branch)
    if scale is None:
        return None
    change = size * _damped(scale) * missing
    return change - direction * (direction * change).mean(-1, keepdim=True)


def _scale(y: Tensor, branch: Tensor) -> Tensor | None:
    """Return g [d] with branch = g ⊙ y, if there is one."""
    energy = y.square().sum(0)
    scale = (y * branch).sum(0) / energy.clamp_min(torch.finfo(y.dtype).tiny)
    left = (branch - scale * y).square().sum()
    return scale if bool(left <= TOLERANCE * branch.square().sum()) else None


def _damped(scale: Tensor) -> Tensor:
    """Return γ; a scale that is the same for all components is inverted exactly."""
    typical = scale.square().median()
    return scale * (1 + DAMPING) / (scale.square() + DAMPING * typical).clamp_min(1e-30)
