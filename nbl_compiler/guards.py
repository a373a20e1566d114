"""What the guards of folded FFNs did: counters, and the predictor's recall on demand."""

from __future__ import annotations

from torch import nn

from nbl_compiler.batches import Batch
from nbl_compiler.config import FFN, Config
from nbl_compiler.errors import ConfigError
from nbl_compiler.ffn.guarded import restore
from nbl_compiler.ffn.sites import FFNSite
from nbl_compiler.ffn.stages import RecallStage, Stage
from nbl_compiler.guard_counters import GuardCounts, read
from nbl_compiler.plans import Plan
from nbl_compiler.registry import check_weights
from nbl_compiler.released_weights import refuse_released
from nbl_compiler.text_pass import TracedModel, observe_again


def guard_counts(plan: Plan) -> dict[str, GuardCounts]:
    """Return what each guarded site of a compiled plan did since the start, or the last reset.

    Counts add up over all models and graphs that the plan object was compiled into. Reading them
    waits for the device.
    """
    counts: dict[str, GuardCounts] = {}
    for name, counters in plan.all_counters():
        found = read(counters)
        counts[name] = found if name not in counts else counts[name] + found
    return counts


def reset_guard_counts(plan: Plan) -> None:
    """Set all counters of a plan to zero."""
    for _, counters in plan.all_counters():
        counters.zero_()


def guard_recall(model: nn.Module, plan: Plan, batch: Batch) -> dict[str, float]:
    """Measure, per guarded site, the share of true outliers that the guard puts right.

    Args:
        model: The dense model.
        plan: Its plan.
        batch: Token ids [B, T], or a mapping of the model's inputs.

    Raises:
        ConfigError: if the plan guards nothing.
    """
    guarded = {site.name: site for site in plan.rewritten if site.guarded}
    if not guarded:
        raise ConfigError("the plan has no guarded FFN; calibrate with FFN(guard=...)")
    model = getattr(model, "_orig_mod", model)  # what torch.compile(model) was made of
    refuse_released(model.parameters(), "measuring recall")
    check_weights(dict(model.named_parameters()), plan, type(model).__name__)
    stages: dict[str, RecallStage] = {}

    def begin(site: FFNSite) -> Stage | None:
        known = guarded.get(site.name)
        if known is None:
            return None
        stages[site.name] = RecallStage(restore(site.weights, known.tensors, known.details))
        return stages[site.name]

    config = Config(attention=None, ffn=FFN(), holdout=0.0)
    observe_again(TracedModel(model), [batch], config, begin, progress=False)
    for stage in stages.values():
        stage.merge_across_processes()
    return {name: stage.recall for name, stage in stages.items()}
