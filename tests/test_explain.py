"""``nbl.explain``."""

from __future__ import annotations

from models.architectures import inputs, make

import nbl_compiler as nbl


def test_without_a_plan_everything_matches_and_nothing_is_rewritten():
    report = nbl.explain(make("qwen3"), **inputs("qwen3"), use_cache=False)
    assert len(report.matched) == 6  # attention and FFNs
    assert report.rewritten == ()
    assert "6 sites match, 0 are rewritten" in str(report)


def test_rejected_sites_say_why():
    report = nbl.explain(make("t5"), **inputs("t5"), use_cache=False)
    crossed = [reason for reason in report.reasons.values() if "cross-attention" in reason]
    assert len(crossed) == 3
    assert "cross-attention" in str(report)
