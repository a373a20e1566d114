"""The form ``keep+fold``: the least linear neurons stay dense, one map stands for all others.

    y ≈ V z_K + M x + b

K are the neurons of the largest E[r²]·‖W2[:, i]‖², r the residual of their linear fit on x; V, M
and b are fitted to y together, V with a ridge towards the original columns of W2. Shapes are
static, and nothing depends on the token, so it is fast at any batch and length.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nbl_compiler.config import FFN, Ridge
from nbl_compiler.ffn.sites import FFNFit, FFNSite, site_facts
from nbl_compiler.ffn.stages import NeuronStage, OutputStage
from nbl_compiler.solvers.ffn_regression import MIN_HOLDOUT_TOKENS, fit_affine_map, fit_output
from nbl_compiler.solvers.folding import kept_count, neuron_scores, select_kept


def choose_kept(site: FFNSite, neurons: NeuronStage, options: FFN, ridge: Ridge) -> Tensor:
    """Return the neurons to keep, ascending [k] int64, from the first pass."""
    f = site.weights.neurons
    count = kept_count(f, options.keep)
    if count in (0, f):
        return torch.arange(count)
    fit = fit_affine_map(neurons.moments, ridge=ridge)
    scores = neuron_scores(fit.residual, site.weights.w2)
    return select_kept(scores.cpu(), count)[0]


def fit_keep_and_fold(
    site: FFNSite, kept: Tensor, stage: OutputStage | None, ridge: Ridge
) -> FFNFit:
    """Fit M, V and b from the second pass; with every neuron kept there is nothing to fit."""
    weights = site.weights
    o, d = weights.w2.shape[0], weights.w1.shape[1]
    facts = details(site, kept)
    tensors: dict[str, Tensor] = {"kept": kept.cpu()}
    if kept.numel() == weights.neurons:
        bias = torch.zeros(o) if weights.b2 is None else weights.b2.detach().float().cpu()
        tensors |= {"down": weights.w2.detach().float().cpu().contiguous(), "bias": bias}
        return FFNFit(site.name, 0.0, 0.0, tensors, facts)
    assert stage is not None
    columns = weights.w2.detach().index_select(1, kept.to(weights.w2.device))
    known = stage.holdout.count >= MIN_HOLDOUT_TOKENS
    fit = fit_output(stage.train, columns, stage.holdout if known else None, ridge=ridge)
    tensors["weight"] = _plain(fit.weight[:, :d])
    tensors["bias"] = _plain(fit.bias)
    if kept.numel():
        tensors["down"] = _plain(fit.weight[:, d:])
    else:
        del tensors["kept"]
    facts |= {"ridge": fit.ridge, "tokens": stage.train.count + stage.holdout.count}
    holdout = fit.holdout_nmse if known else fit.nmse
    return FFNFit(site.name, fit.nmse, holdout, tensors, facts)


def details(site: FFNSite, kept: Tensor) -> dict[str, object]:
    """Return the facts about a folded site that the plan shows."""
    weights = site.weights
    (f, d), o = weights.w1.shape, weights.w2.shape[0]
    k = kept.numel()
    rows = 2 if weights.gated else 1
    biases = sum(b is not None for b in (weights.b1, weights.b_up)) * k + o
    matrix = 0 if k == f else o * d
    return site_facts(site, "keep+fold", k) | {
        "parameters_read": k * (rows * d + o) + matrix + biases
    }


def output_stages(
    sites: Mapping[str, FFNSite], kept: Mapping[str, Tensor]
) -> dict[str, OutputStage]:
    """Return the second pass's stages, for the sites that have something to fit."""
    return {
        name: OutputStage(site, kept[name])
        for name, site in sites.items()
        if kept[name].numel() < site.weights.neurons
    }


def _plain(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", torch.float32).contiguous()
