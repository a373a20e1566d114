"""From the first pass over the text to a fit of every FFN site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from nbl_compiler.config import FFN, Ridge
from nbl_compiler.ffn.exact import fit_exact
from nbl_compiler.ffn.keep_and_fold import choose_kept, fit_keep_and_fold, output_stages
from nbl_compiler.ffn.predicted import RunPass, fit_predicted
from nbl_compiler.ffn.sites import FFNFit, FFNSite
from nbl_compiler.ffn.stages import NeuronStage
from nbl_compiler.monitoring.statistics import input_statistics


def fit_ffns(
    sites: Mapping[str, FFNSite],
    first: Mapping[str, NeuronStage],
    options: FFN,
    ridge: Ridge,
    run_pass: RunPass,
) -> tuple[FFNFit, ...]:
    """Fit all sites as the options ask, in model order.

    Args:
        sites: Every matched FFN.
        first: What the first pass added up at each of them.
        options: The form and its settings.
        ridge: As in ``Config``.
        run_pass: Runs the model over the text once more with these stages.
    """
    if not sites:
        return ()
    if options.guard == "exact" and options.keep < 1:
        fits = fit_exact(sites, first, options, run_pass)
    else:
        kept = {n: choose_kept(site, first[n], options, ridge) for n, site in sites.items()}
        whole = {n for n, site in sites.items() if kept[n].numel() == site.weights.neurons}
        if options.guard == "off" or len(whole) == len(sites):
            stages = output_stages(sites, kept)
            if stages:
                run_pass(stages)
            fits = [fit_keep_and_fold(s, kept[n], stages.get(n), ridge) for n, s in sites.items()]
        else:
            fits = fit_predicted(sites, kept, first, options, ridge, run_pass)
            fits += [fit_keep_and_fold(sites[n], kept[n], None, ridge) for n in whole]
    order = list(sites)
    fits = [replace(fit, inputs=_inputs(first[fit.name])) for fit in fits]
    return tuple(sorted(fits, key=lambda fit: order.index(fit.name)))


def _inputs(first: NeuronStage) -> dict[str, Tensor]:
    """Return what the plan stores of the distribution of x."""
    moments = first.moments
    return input_statistics(moments.input_mean, moments.input_covariance.diagonal())
