"""A folded FFN as a function, run before there is a plan: for trials in the model."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nbl_compiler.ffn.guarded import restore
from nbl_compiler.ffn.sites import FFNFit
from nbl_compiler.lowering.guarded_ffn import reference
from nbl_compiler.plans import Site
from nbl_compiler.solvers.folding import FFNWeights, hidden_product


def folded_ffn(weights: FFNWeights, fit: FFNFit | Site) -> Callable[[Tensor], Tensor]:
    """Return what a fit makes of its FFN: x [..., d] → y [..., o].

    Args:
        weights: The model's own weights.
        fit: Its fit, of any form, or a plan's site.
    """
    kept = fit.tensors.get("kept", torch.zeros(0, dtype=torch.int64))
    compact = weights.select(kept)
    if fit.details["form"] == "guarded":

        def guarded(x: Tensor) -> Tensor:
            # Restored at each call: kept for all sites, the copies would be a second model.
            y = reference(restore(weights, fit.tensors, fit.details), x).output
            return y + F.linear(hidden_product(compact, x), compact.w2) if kept.numel() else y

        return guarded

    def keep_and_fold(x: Tensor) -> Tensor:
        own = {name: fit.tensors[name].to(x) for name in ("weight", "down") if name in fit.tensors}
        y = fit.tensors["bias"].to(x).expand(*x.shape[:-1], -1)
        if "weight" in own:
            y = y + F.linear(x, own["weight"])
        if "down" in own:
            y = y + F.linear(hidden_product(compact, x), own["down"])
        return y

    return keep_and_fold
