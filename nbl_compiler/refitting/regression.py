"""Fitting one site's tensors anew: what is linear in them, towards what they are.

    attention             t ≈ W u + b                u = x, with value states if it reads some
    keep+fold             t ≈ [M V] u + b            u = [x, kept neurons' values]
    guarded, predicted    t − fix(x) ≈ C x + b       fix(x) what the outliers add

in place of W, M and V, C what the plan holds is the prior of a ridge regression; a ridge that is
large enough on held-out tokens leaves them as they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from nbl_compiler.config import Ridge
from nbl_compiler.ffn.stand_in import folded_ffn
from nbl_compiler.passes.switches import StandIn, linear_map
from nbl_compiler.plans import Site
from nbl_compiler.solvers.ffn_moments import RegressionMoments
from nbl_compiler.solvers.ffn_regression import MIN_HOLDOUT_TOKENS, AffineMap, fit_affine_map
from nbl_compiler.solvers.folding import FFNWeights, hidden_product
from nbl_compiler.value_states import joined_weight, split_weight, states_of

# Ridges towards what the plan holds, relative to each regressor's variance: from "fit it anew" to
# "leave it".
RIDGES = (0.0, *(10.0 ** (k / 2) for k in range(-12, 13)))


def refusal(site: Site) -> str:
    """Return why a rewritten site cannot be fitted anew, or an empty string."""
    if site.kind == "ffn" and site.details.get("guard") == "exact":
        return "its guard's certified bound holds for the maps that it was made with"
    if "weight" not in site.tensors:
        return "all its neurons are kept: nothing was fitted"
    return ""


def stand_in(site: Site, weights: FFNWeights | None) -> StandIn:
    """Return what a plan makes of a site, as a function of what the site's map reads."""
    if weights is not None:
        return folded_ffn(weights, site)
    return linear_map(joined_weight(site.tensors), site.tensors["bias"])


@dataclass(frozen=True)
class Rows:
    """One batch's tokens at a site that count.

    Args:
        regressors: u, [n, p].
        target: t minus what is not linear in the tensors, [n, q].
    """

    regressors: Tensor
    target: Tensor


def rows_of(site: Site, weights: FFNWeights | None, x: Tensor, target: Tensor) -> Rows:
    """Return regressors and targets.

    Args:
        site: The site as the plan has it.
        weights: The FFN's own weights; None for attention.
        x: What the site's map reads, [n, d], with value states behind it.
        target: What the site should give, [n, q].
    """
    if weights is None:
        return Rows(x, target)
    if site.details["form"] == "guarded":
        weight, bias = (site.tensors[name].to(x) for name in ("weight", "bias"))
        fix = folded_ffn(weights, site)(x) - F.linear(x, weight, bias)
        return Rows(x, target - fix)
    if "kept" not in site.tensors:
        return Rows(x, target)
    hidden = hidden_product(weights.select(site.tensors["kept"]), x)
    return Rows(torch.cat([x, hidden], -1), target)


def prior_of(site: Site) -> Tensor:
    """Return what the plan holds of the linear part, [q, p]."""
    if site.kind == "attention":
        return joined_weight(site.tensors)
    parts = [site.tensors["weight"]]
    if site.details["form"] == "keep+fold" and "down" in site.tensors:
        parts.append(site.tensors["down"])
    return torch.cat(parts, 1)


def fit(
    site: Site, train: RegressionMoments, holdout: RegressionMoments, ridge: Ridge
) -> AffineMap:
    """Return the map of least squared error, shrunk towards the plan's.

    Args:
        site: The site as the plan has it.
        train: Moments of (u, t) to fit.
        holdout: Of held-out tokens, which choose the ridge.
        ridge: ``"auto"`` for that, or a number.
    """
    known = holdout.count >= MIN_HOLDOUT_TOKENS
    return fit_affine_map(
        train, holdout if known else None, ridge=ridge, prior=prior_of(site), ridges=RIDGES
    )


def with_map(site: Site, made: AffineMap, facts: Mapping[str, object]) -> Site:
    """Return the site with the tensors of a new map and facts for its ``details``."""
    weight = made.weight.to("cpu", torch.float32)
    width = site.tensors["weight"].shape[1]
    if site.kind == "attention":
        tensors = split_weight(weight, width, states_of(site.details))
    else:
        tensors = {"weight": weight[:, :width].contiguous()}
        if weight.shape[1] > width:
            tensors["down"] = weight[:, width:].contiguous()
    tensors["bias"] = made.bias.to("cpu", torch.float32).contiguous()
    return replace(
        site,
        tensors={**site.tensors, **tensors},
        details={**site.details, **facts},
    )
