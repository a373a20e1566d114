"""``nbl.explain``."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from helpers.plans import random_plan
from helpers.tiny import output, text, texts, tiny
from models.architectures import BY_NAME, HIDDEN, inputs, make
from torch import Tensor, nn

import nbl_compiler as nbl
from nbl_compiler.cost import Machine
from nbl_compiler.explanation import Report, place
from nbl_compiler.html_report.curve import draw_curve, points
from nbl_compiler.site_rows import SiteRow

BOTH = nbl.Config(attention=nbl.Attention(count=1), ffn=nbl.FFN(count=1, keep=0.25))


@pytest.fixture(scope="module")
def report() -> Report:
    """One attention site and one FFN rewritten, of two each."""
    model = tiny()
    nbl.calibrate(model, texts(), BOTH, progress=False)  # attached: explain finds it
    return nbl.explain(model, text(), use_cache=False)


def by_state(report: Report, state: str) -> list[SiteRow]:
    return [row for row in report.rows if row.state == state]


def test_without_a_plan_everything_matches_and_nothing_is_rewritten() -> None:
    report = nbl.explain(make("qwen3"), **inputs("qwen3"), use_cache=False)
    assert len(report.matched) == 6  # attention and FFNs
    assert report.rewritten == ()
    assert {row.reason for row in report.rows} == {"no plan"}
    assert "6 sites match, 0 are rewritten" in str(report)


def test_rejected_sites_say_why_and_where() -> None:
    report = nbl.explain(make("t5"), **inputs("t5"), use_cache=False)
    crossed = [row for row in report.rows if "cross-attention" in row.reason]
    assert len(crossed) == 3
    assert all(row.state == "rejected" and "modeling_t5.py" in row.source for row in crossed)
    shown = str(report)
    assert "cross-attention" in shown
    assert crossed[0].node in shown
    assert "modeling_t5.py:" in shown


def test_one_row_a_site_in_graph_order(report: Report) -> None:
    assert [row.site for row in report.rows] == [
        f"model.layers.{layer}.{part}" for layer in range(2) for part in ("self_attn", "mlp")
    ]
    assert {row.kind for row in by_state(report, "rewritten")} == {"attention", "ffn"}
    for row in by_state(report, "left dense"):
        assert row.reason.endswith(f" of 2 by {'nmse' if row.kind == 'attention' else 'loss'}")


def test_rows_carry_the_plan_s_errors(report: Report) -> None:
    for row in report.rows:
        site = report.plan.find(row.site, row.kind)
        assert site is not None
        assert row.holdout_nmse == site.holdout_nmse
        assert row.nmse == site.nmse
        assert row.cca_bound == site.cca_bound or math.isnan(site.cca_bound)


def test_work_before_and_after(report: Report) -> None:
    tokens = text().numel()
    for row in by_state(report, "left dense"):
        assert row.before is row.after
    for row in by_state(report, "rewritten"):
        assert row.after.flops < row.before.flops
        assert row.after.bytes < row.before.bytes
    (attention,) = (r for r in by_state(report, "rewritten") if r.kind == "attention")
    assert attention.after.flops == 2 * tokens * HIDDEN * HIDDEN
    # x [n, d] in, y [n, d] out, W [d, d] and b [d]; float32
    assert attention.after.bytes == 4 * (2 * tokens * HIDDEN + HIDDEN * HIDDEN + HIDDEN)
    assert [node.operation for node in attention.after.nodes] == ["linear"]
    assert "scaled_dot_product_attention" in attention.matched


def test_predicted_times_follow_the_machine(report: Report) -> None:
    machine = Machine(bytes_per_second=1e9, flops_per_second=1e30)
    (row,) = (r for r in by_state(report, "rewritten") if r.kind == "attention")
    assert row.after.seconds(machine) == pytest.approx(row.after.bytes / 1e9)


def test_a_narrow_terminal_gets_the_reasons_below(report: Report) -> None:
    _, *whys = report.tables(width=80)
    assert [why.split(":")[0] for why in whys] == [row.site for row in report.rows]
    assert len(report.tables(width=150)) == 1


def test_json_is_plain(report: Report) -> None:
    plain = json.loads(json.dumps(report.as_json()))
    assert [site["state"] for site in plain["sites"]].count("rewritten") == 2
    assert plain["plan"] == report.plan.digest
    assert all(site["predicted_ms"][0] > 0 for site in plain["sites"])
    assert all(site["measured_ms"] is None for site in plain["sites"])


def test_measured_times_and_what_they_leave_behind() -> None:
    model = tiny()
    plan = random_plan(model, BY_NAME["llama"].site_names(2), [1], HIDDEN)
    dense = output(model, text())
    report = nbl.explain(model, text(), plan=plan, measure=True, lowering="eager")
    times = {row.site: row.measured for row in report.rows}
    assert {site for site, time in times.items() if time} == {"model.layers.1.self_attn"}
    assert all(seconds > 0 for seconds in times["model.layers.1.self_attn"] or ())
    assert "measured ms" in str(report)
    assert torch.equal(output(model, text()), dense)


class Regions(nn.Module):
    """Attention without an output projection, and an FFN with an unknown activation."""

    def __init__(self, *, attention: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.tanh(self.first(x)))
        if not self.attention:
            return x
        query = self.first(x)
        return nn.functional.scaled_dot_product_attention(query, query, query) + 1


def test_the_nearest_miss_is_shown() -> None:
    report = nbl.explain(Regions(attention=True).eval(), torch.randn(1, 4, 8))
    assert report.matched == ()
    assert report.near_miss is not None
    assert report.near_miss.reason.startswith("unknown activation: `tanh`")  # two steps, not one
    shown = " ".join(str(report).split())
    assert "nearest miss: ffn.0 (ffn): unknown activation: `tanh`" in shown
    assert "test_explain.py" in shown


def test_no_site_at_all_says_what_was_looked_for() -> None:
    report = nbl.explain(nn.Linear(4, 4).eval(), torch.ones(2, 4))
    assert report.near_miss is None
    assert "among 1 traced calls in 1 graph(s) there is neither attention" in str(report)


def test_places_are_short() -> None:
    assert place('File "/a/b/modeling_x.py", line 12, in forward | y = f(x)') == "modeling_x.py:12"
    assert place("") == ""


def test_the_curve_adds_up() -> None:
    curve = points([("b", 0.3, 2.0), ("a", 0.1, 3.0)], total_seconds=10.0)
    assert [(p.site, p.speedup, round(p.error, 9)) for p in curve] == [
        ("dense", 1.0, 0.0),
        ("a", 10 / 7, 0.1),
        ("b", 2.0, 0.4),
    ]
    assert draw_curve(curve).count("<circle") == 3
    assert draw_curve(curve[:1]) == ""


def test_a_report_that_cannot_be_written(report: Report, tmp_path: Path) -> None:
    with pytest.raises(nbl.errors.ConfigError, match="cannot be written"):
        report.save_html(tmp_path / "no folder" / "report.html")
    assert not list(tmp_path.iterdir())
