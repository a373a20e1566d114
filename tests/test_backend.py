"""``torch.compile(model, backend="nbl")``: options, lowerings, warnings, graph breaks."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from helpers.plans import random_plan
from helpers.surgery import linearize_by_surgery
from helpers.tiny import compiled, config, output, text, texts, tiny
from models.architectures import BY_NAME, HIDDEN
from torch import Tensor, nn

import nbl_compiler as nbl
from nbl_compiler import backend
from nbl_compiler.errors import (
    ConfigError,
    InferenceOnlyError,
    NBLWarning,
    StrictError,
    ToolchainError,
)
from nbl_compiler.graph_report import GraphReport

# Float32 rounding of a tiny model with logits of order 1–10.
TOLERANCE = 1e-4


def plan_for(model: nn.Module, sites: int = 1) -> nbl.Plan:
    return random_plan(model, BY_NAME["llama"].site_names(sites), range(sites), HIDDEN)


def one_layer() -> nn.Module:
    return tiny(layers=1)


def mapped(model: nn.Module, plan: nbl.Plan, ids: Tensor | None = None) -> Tensor:
    return output(linearize_by_surgery(model, plan), text() if ids is None else ids)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_the_name_works_without_an_import() -> None:
    code = """
import sys, warnings
import torch
assert "nbl" in torch._dynamo.list_backends()
assert not any(name.startswith("nbl_compiler") for name in sys.modules)
model = torch.nn.Linear(4, 4)
with warnings.catch_warnings(record=True) as caught, torch.no_grad():
    warnings.simplefilter("always")
    result = torch.compile(model, backend="nbl")(torch.ones(2, 4))
    assert torch.allclose(result, model(torch.ones(2, 4)))
print([str(w.message)[:30] for w in caught if "nbl" in str(w.message)])
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == """['backend="nbl" found no plan fo']"""


def test_without_a_plan_the_model_is_exact_and_one_warning_says_so() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in ("llama", "gpt2"):
            model = tiny(name, layers=1)
            assert torch.equal(output(compiled(model), text()), output(model, text()))
    own = [w for w in caught if issubclass(w.category, NBLWarning)]
    assert len(own) == 1
    assert "Calibrate one with `plan = nbl_compiler.calibrate(model, batches)`" in str(
        own[0].message
    )


def test_a_function_without_weights_needs_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.compile(torch.sin, backend="nbl", options={"lowering": "eager"})(
            torch.zeros(2)
        ).equal(torch.zeros(2))


@pytest.mark.parametrize(
    ("lowering", "dynamic"), [("eager", None), ("eager", False), ("aot_eager", True)]
)
def test_lowerings_and_shapes_agree(lowering: str, dynamic: bool | None) -> None:
    model = one_layer()
    plan = plan_for(model)
    fast = torch.compile(
        model, backend="nbl", dynamic=dynamic, options={"plan": plan, "lowering": lowering}
    )
    for shape in ((4, 48), (2, 17)):
        ids = text(*shape)
        torch.testing.assert_close(
            output(fast, ids), mapped(model, plan, ids), rtol=0, atol=TOLERANCE
        )


def test_inductor() -> None:
    """The default lowering, with a mode and an option of Inductor's own."""
    model = one_layer()
    plan = plan_for(model)
    fast = torch.compile(
        model,
        backend="nbl",
        options={
            "plan": plan,
            "mode": "max-autotune-no-cudagraphs",
            "inductor": {"max_autotune": False, "epilogue_fusion": True},
        },
    )
    torch.testing.assert_close(output(fast, text()), mapped(model, plan), rtol=0, atol=TOLERANCE)


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Record what is handed to Inductor, and lower nothing."""
    patches: list[dict[str, Any]] = []

    def record(graph_module: Any, inputs: Any, lowering: str, options: Any) -> Callable[..., Any]:
        assert lowering == "inductor"
        patches.append(dict(options))
        return graph_module.forward  # type: ignore[no-any-return]

    monkeypatch.setattr(backend, "lower", record)
    return patches


NO_GRAPHS = "max-autotune-no-cudagraphs"
AUTOTUNE = {"max_autotune": True, "coordinate_descent_tuning": True}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, {}),
        ({"mode": "default"}, {}),
        ({"mode": NO_GRAPHS}, AUTOTUNE),
        ({"options": {"mode": NO_GRAPHS}}, AUTOTUNE),
        ({"mode": "reduce-overhead"}, {"triton.cudagraphs": True}),
        ({"options": {"inductor": {"max_autotune": True}}}, {"max_autotune": True}),
        (
            {
                "options": {
                    "mode": "max-autotune-no-cudagraphs",
                    "inductor": {"max_autotune": False},
                }
            },
            {**AUTOTUNE, "max_autotune": False},
        ),
    ],
)
def test_modes_and_options_reach_inductor(
    lowered: list[dict[str, Any]], arguments: dict[str, Any], expected: dict[str, Any]
) -> None:
    torch.compile(torch.sin, backend="nbl", **arguments)(torch.zeros(2))
    assert lowered == [expected]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plans": "x"}, "unknown option 'plans'; backend nbl knows plan, lowering, dump_dir"),
        ({"lowering": "triton"}, "lowering='triton' must be one of inductor, aot_eager, eager"),
        ({"lowering": None}, "lowering=None must be one of"),
        ({"plan": 3}, "plan=3 must be a Plan or its path"),
        ({"plan": {"a": 1}}, "must be a Plan or its path"),
        ({"plan": "/no/such/plan"}, r"cannot read a plan at /no/such/plan .*plan\.save"),
        ({"plan": "/"}, "cannot read a plan at /"),
        ({"strict": "yes"}, "strict='yes' must be True or False"),
        ({"dump_dir": 7}, "dump_dir=7 must be a folder"),
        ({"dump_dir": "/dev/null/x", "lowering": "eager"}, "dump_dir /dev/null/x cannot be"),
        ({"inductor": 1}, "inductor=1 must be a mapping"),
        ({"inductor": {"max_autotunes": 1}}, "Inductor has no option 'max_autotunes'"),
        ({"mode": "fastest"}, "Unrecognized mode=fastest"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        torch.compile(torch.sin, backend="nbl", options=options)(torch.zeros(2))


def test_a_bad_mode() -> None:
    with pytest.raises(ConfigError, match="Unrecognized mode=fastest"):
        torch.compile(torch.sin, backend="nbl", mode="fastest")(torch.zeros(2))


def test_a_damaged_plan_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "plan"
    path.write_bytes(b"nonsense")
    with pytest.raises(nbl.errors.PlanFormatError, match="not a whole safetensors file"):
        torch.compile(torch.sin, backend="nbl", options={"plan": path})(torch.zeros(2))


# Gradients.


def test_a_plan_that_rewrites_nothing_streams_products_and_lets_train() -> None:
    layer, x = nn.Linear(16, 8), torch.randn(1, 16)
    reports: list[GraphReport] = []
    fast = torch.compile(
        layer, backend="nbl", options={"plan": nbl.Plan(), "report": reports.append}
    )
    with torch.no_grad():
        torch.testing.assert_close(fast(x), layer(x), rtol=0, atol=TOLERANCE)
    (report,) = reports
    assert "1 linear layers streamed" in {n for run in report.runs for n in run.report.notes}
    fast(x).sum().backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, x.expand(8, 16), rtol=0, atol=TOLERANCE)
    assert len(reports) == 1  # the graph with gradients is Inductor's alone


def test_gradients_are_refused() -> None:
    model = one_layer()
    fast = compiled(model, plan=plan_for(model))
    with pytest.raises(InferenceOnlyError, match=r"call it under torch\.inference_mode\(\) or"):
        fast(text())
    output(fast, text())
    with pytest.raises(InferenceOnlyError):  # also when it was compiled without them before
        fast(text())


def test_gradients_of_nothing_are_no_gradients() -> None:
    model = one_layer().requires_grad_(False)
    plan = plan_for(model)
    result = compiled(model, plan=plan)(text()).logits
    torch.testing.assert_close(result, mapped(model, plan), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("lowering", ["eager", "aot_eager"])
def test_what_is_compiled_in_inference_mode_serves_without_it(lowering: str) -> None:
    model = one_layer().to(torch.bfloat16)
    plan = plan_for(model)
    fast = compiled(model, plan=plan, lowering=lowering)
    with torch.inference_mode():
        first = fast(text()).logits
    assert torch.equal(first, output(fast, text()))
    assert not plan.tensor(plan.sites[0], "bias", first).is_inference()


# Sites that cannot be rewritten.


def with_dropout() -> nn.Module:
    model = one_layer()
    model.model.layers[0].self_attn.attention_dropout = 0.5
    return model.train()


def test_a_site_that_the_graph_refuses_runs_dense_with_a_warning() -> None:
    model = with_dropout()
    fast = compiled(model, plan=plan_for(model))
    message = (
        r"1 site\(s\) of the plan cannot be rewritten here; first: .*self_attn: dropout is active"
    )
    with pytest.warns(NBLWarning, match=message):
        output(fast, text())


def test_strict_refuses_it() -> None:
    model = with_dropout()
    fast = compiled(model, plan=plan_for(model), strict=True)
    with pytest.raises(StrictError, match=r"dropout is active.*; calibrate this model, or drop"):
        output(fast, text())


def test_strict_refuses_a_site_that_the_plan_does_not_know() -> None:
    model = tiny()
    whole = plan_for(model, 2)
    partial = nbl.Plan(whole.sites[:1], whole.fingerprint)
    with pytest.raises(StrictError, match=r"layers\.1\.self_attn: the plan does not know"):
        output(compiled(model, plan=partial, strict=True), text())
    torch.testing.assert_close(
        output(compiled(model, plan=partial), text()), mapped(model, partial),
        rtol=0, atol=TOLERANCE,
    )  # fmt: skip


def test_strict_is_content_with_what_the_plan_keeps() -> None:
    model = tiny()
    plan = random_plan(model, BY_NAME["llama"].site_names(2), [1], HIDDEN)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NBLWarning)
        result = output(compiled(model, plan=plan, strict=True), text())
    torch.testing.assert_close(result, mapped(model, plan), rtol=0, atol=TOLERANCE)


# Graph breaks.


class Broken(nn.Module):
    """Two encoders with a graph break between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = tiny("bert", layers=1), tiny("bert", seed=1, layers=1)

    def forward(self, ids: Tensor) -> Any:
        hidden = self.first(ids).last_hidden_state
        torch._dynamo.graph_break()
        return self.second(inputs_embeds=hidden)


def test_a_graph_break_loses_no_site() -> None:
    model = Broken().eval()
    plan = nbl.calibrate(model, texts(), config(layers=(0, 1)), progress=False)
    sites = ["first.encoder.layer.0.attention", "second.encoder.layer.0.attention"]
    assert [site.name for site in plan.rewritten] == sites
    torch._dynamo.reset()
    fast = compiled(model, strict=True)
    torch.testing.assert_close(
        output(fast, text()), output(linearize_by_surgery(model, plan), text()),
        rtol=0, atol=TOLERANCE,
    )  # fmt: skip
    nbl.attach(model, None)  # is noticed by both graphs
    with pytest.warns(NBLWarning, match="found no plan"):
        assert torch.equal(output(fast, text()), output(model, text()))


# The compiler that Inductor needs.


@pytest.mark.parametrize("how", ["none on the path", "CXX names nothing"])
def test_a_missing_compiler(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = one_layer()
    patch: dict[str, Any] = {}
    if how == "none on the path":
        monkeypatch.setenv("PATH", "/nowhere")
    else:  # torch reads CXX when it is imported
        patch = {"cpp.cxx": (None, "no-such-compiler")}
    message = r"no C\+\+ compiler|with a C\+\+ compiler, and none was found"
    with torch._inductor.config.patch(patch), pytest.raises(ToolchainError, match=message):
        output(torch.compile(model, backend="nbl", options={"plan": plan_for(model)}), text())
    # And the advice in the message is good.
    output(compiled(model, plan=plan_for(model)), text())
