"""Running a model over text with observers in its graphs.

Tracing a model takes longer than running it over some hundred tokens, and calibration goes over its
text several times with other observers. So each graph is traced once and kept as it is; a pass puts
its observers into a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch._dynamo
from torch import nn
from torch.fx import GraphModule

from nbl_compiler.batches import cheap_arguments, model_inputs
from nbl_compiler.config import Config
from nbl_compiler.distributed import fail_together, in_any_process
from nbl_compiler.errors import CalibrationError, NBLError
from nbl_compiler.ffn.sites import FFNSite
from nbl_compiler.ffn.stages import NeuronStage, Stage
from nbl_compiler.looking import Looking
from nbl_compiler.observe import Observation, Observer
from nbl_compiler.observe_gates import GateObserver, Samples
from nbl_compiler.passes.private_copy import private_copy
from nbl_compiler.progress import token_bar
from nbl_compiler.recoded_text import Recoded
from nbl_compiler.row_openings import RowOpenings
from nbl_compiler.select import check_selection
from nbl_compiler.several_processes import ALONE, Share
from nbl_compiler.text_share import Passage, length_of
from nbl_compiler.value_states import Gates

Seen = TypeVar("Seen")


class TracedModel:
    """A model to run over text, pass after pass.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._observer: Looking[Any] | None = None
        self._run = torch.compile(private_forward(model), backend=self._backend, dynamic=None)

    def __call__(self, observer: Looking[Any], **inputs: Any) -> None:
        """Run one batch, with observers at the sites."""
        self._observer = observer
        try:
            self._run(**inputs)
        finally:
            self._observer = None

    def _backend(self, graph_module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        kept = private_copy(graph_module)  # Dynamo strips its own once it is compiled
        assert self._observer is not None
        observed = self._observer, self._observer.backend(kept, inputs)

        def run(*args: Any) -> Any:
            nonlocal observed
            assert self._observer is not None
            if observed[0] is not self._observer:
                observed = self._observer, self._observer.backend(kept, args)
            return observed[1](*args)

        return run


def observe(
    model: TracedModel,
    batches: Iterable[Passage],
    config: Config,
    *,
    rows: Share = ALONE,
    gates: Mapping[str, Gates] | None = None,
    progress: bool,
) -> Observation:
    """Run the first pass: moments of attention sites, and of the neurons of FFN sites.

    Args:
        model: To run.
        batches: Text. FFN sites are not looked at where it is recoded.
        config: What to look at.
        rows: Which of the rows this process takes.
        gates: Site name → gates, where mixed values are to be looked at.
        progress: Show a progress bar.
    """
    ffn = config.ffn
    begin: Callable[[FFNSite], Stage | None] | None = None
    if ffn is not None:
        ranges = ffn.guard == "exact"

        def begin(site: FFNSite) -> Stage | None:
            return NeuronStage(site, ranges=ranges and not site.weights.gated)

    observer = Observer(
        config,
        attention=config.attention is not None,
        begin_ffn=begin,
        rows=rows,
        gates=gates,
    )

    def check() -> None:
        if config.attention is not None and observer.site_names:
            check_selection(observer.site_names, config.attention)
        if ffn is not None and observer.ffn_names:
            check_selection(observer.ffn_names, ffn)

    return _run(model, batches, observer, "calibrating", progress, check)


def observe_weights(
    model: TracedModel, batches: Iterable[Passage], config: Config, *, progress: bool
) -> dict[str, Samples]:
    """Run a pass over some text that looks at what attention does with its weights."""
    observer = GateObserver(config.holdout, config.seed)
    title = "looking at attention"
    return _run(model, batches, observer, title, progress, lambda: None)


def observe_again(
    model: TracedModel,
    batches: Iterable[Passage],
    config: Config,
    begin: Callable[[FFNSite], Stage | None],
    *,
    rows: Share = ALONE,
    progress: bool,
) -> None:
    """Run a further pass over the FFN sites for which ``begin`` returns a stage.

    The stages are this process's alone; the caller merges them.
    """
    observer = Observer(config, attention=False, begin_ffn=begin, rows=rows)
    seen = _run(model, batches, observer, "fitting FFNs", progress, lambda: None)
    assert seen.ffn is not None
    if not in_any_process(bool(seen.ffn.sites)):  # of a few batches, some processes have none
        raise CalibrationError(
            "the batches could be gone through only once, but FFNs take several passes; give "
            "a list of batches, or an iterator (whose batches are kept)"
        )


def _run(
    model: TracedModel,
    batches: Iterable[Passage],
    observer: Looking[Seen],
    title: str,
    progress: bool,
    check: Callable[[], None],
) -> Seen:
    """Run the model over the batches; if that fails, it fails in every process."""
    error = None
    try:
        _run_batches(model, batches, observer, title, progress, check)
        seen = observer.finish()
    except NBLError as failure:
        error = failure
    finally:
        observer.release()
    fail_together(error)
    return seen


def _run_batches(
    traced: TracedModel,
    batches: Iterable[Passage],
    observer: Looking[Any],
    title: str,
    progress: bool,
    check: Callable[[], None],
) -> None:
    model = traced.model
    cheap = cheap_arguments(model)
    device = device_of(model)
    openings = RowOpenings(model)
    total = length_of(batches)
    with torch.no_grad(), many_shapes(), token_bar(total, title, progress) as advance:
        for number, passage in enumerate(batches):
            recoded = isinstance(passage, Recoded)
            inputs = _inputs(model, passage, device)
            if inputs is not None:
                observer.start_batch(inputs, recoded=recoded)
                if not recoded:
                    openings.add(inputs)
                traced(observer, **{**cheap, **inputs})
            if number == 0:
                check()  # a wrong request ends here, not after the last batch
            advance(0 if inputs is None else observer.batch_tokens)
    openings.warn()


def _inputs(model: nn.Module, passage: Passage, device: torch.device) -> dict[str, Any] | None:
    """Return the model's inputs, or None for a batch that cannot be recoded."""
    if isinstance(passage, Recoded):
        return passage.inputs(model, model_inputs(model, passage.batch, device))
    return model_inputs(model, passage, device)


def private_forward(model: nn.Module) -> Callable[..., Any]:
    """Return a function with a code object of its own, which runs the model.

    Dynamo keeps compiled code with the code object of what it compiled. Kept with the model's
    ``forward``, the graphs of calibration would outlive it, and would count towards the limit
    after which Dynamo no longer compiles that method.
    """

    def forward(**inputs: Any) -> Any:
        return model(**inputs)

    forward.__code__ = forward.__code__.replace(co_name="nbl_calibration")
    return forward


def many_shapes() -> Any:
    """Allow one compiled graph a batch shape: text comes in many lengths."""
    return torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=4096)


def device_of(model: nn.Module) -> torch.device:
    """Return where the model's weights are."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))
