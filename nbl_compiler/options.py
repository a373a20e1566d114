"""What ``torch.compile(model, backend="nbl", options={...})`` accepts."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from os import PathLike
from typing import Any, Literal

from nbl_compiler.dumps.inputs import DUMP_INPUTS
from nbl_compiler.errors import ConfigError
from nbl_compiler.graph_report import GraphReport
from nbl_compiler.int8_weights import QUANTIZE, Quantize
from nbl_compiler.lowering.lower import LOWERINGS, mode_options
from nbl_compiler.passes.base import Pass
from nbl_compiler.passes.extension import check_passes
from nbl_compiler.plans import Plan

_FROM_ENVIRONMENT = {"dump_dir": "NBL_DUMP", "dump_inputs": "NBL_DUMP_INPUTS"}


@dataclass(frozen=True)
class Options:
    """The backend's options.

    Args:
        plan: A plan, or the path of one; without it, the plan attached to the model.
        lowering: ``"inductor"``, ``"aot_eager"`` or ``"eager"``.
        dump_dir: Folder for graph dumps; without it, the environment variable ``NBL_DUMP``.
        strict: Raise if a graph holds sites and one that the plan rewrites is not rewritten.
        mode: ``torch.compile``'s ``mode``, which torch does not take beside ``options``.
        inductor: Patches of ``torch._inductor.config``; they come after those of ``mode``.
        report: Called with a ``GraphReport`` for every graph that passes ran on.
        dump_inputs: ``"real"`` keeps the weights in the dump (once for all graphs), so that its
            files compute what the model computes; ``"random"`` keeps their shape, mean and
            standard deviation. Without it, ``NBL_DUMP_INPUTS``.
        quantize: How a plan's matrices are held: ``"auto"`` (as int8 in place of weights that
            torchao quantized, else in the model's dtype), ``"int8"`` or ``"off"``.
        guard_tokens: Guarded FFNs run dense in graphs of more tokens (batch times length) than
            this: there a guard looks at nearly every neuron, and costs more than it saves. Without
            it every graph computes the same function, as an evaluation over whole texts needs.
        passes: Passes of your own (``docs/own-pass.md`` says how to write one); they run with or
            without a plan.
    """

    plan: Plan | str | PathLike[str] | None = None
    lowering: str = "inductor"
    dump_dir: str | PathLike[str] | None = None
    strict: bool = False
    mode: str | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)
    report: Callable[[GraphReport], None] | None = None
    dump_inputs: Literal["real", "random"] = "real"
    quantize: Quantize = "auto"
    guard_tokens: int | None = None
    passes: Sequence[Pass] = ()

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None, mode: str | None = None) -> Options:
        """Check and type what torch.compile handed over.

        Raises:
            ConfigError: for an unknown option or value.
        """
        given = dict(options or {})
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                raise ConfigError(f"unknown option {name!r}; backend nbl knows {', '.join(known)}")
        if mode is not None:
            given.setdefault("mode", mode)
        for name, variable in _FROM_ENVIRONMENT.items():
            if given.get(name) is None and os.environ.get(variable):
                given[name] = os.environ[variable]
        given["passes"] = check_passes(given.get("passes", ()))
        parsed = cls(**given)
        _check_type("plan", parsed.plan, (Plan, str, PathLike, type(None)), "a Plan or its path")
        _check_type("dump_dir", parsed.dump_dir, (str, PathLike, type(None)), "a folder")
        _check_type("strict", parsed.strict, (bool,), "True or False")
        _check_type("inductor", parsed.inductor, (Mapping,), "a mapping of Inductor's options")
        if parsed.dump_inputs not in DUMP_INPUTS:
            known_inputs = ", ".join(DUMP_INPUTS)
            raise ConfigError(f"dump_inputs={parsed.dump_inputs!r} must be one of {known_inputs}")
        if parsed.quantize not in QUANTIZE:
            raise ConfigError(f"quantize={parsed.quantize!r} must be one of {', '.join(QUANTIZE)}")
        tokens = parsed.guard_tokens
        if tokens is not None and (type(tokens) is not int or tokens < 1):
            raise ConfigError(f"guard_tokens={tokens!r} must be a number of tokens, at least 1")
        if parsed.lowering not in LOWERINGS:
            raise ConfigError(f"lowering={parsed.lowering!r} must be one of {', '.join(LOWERINGS)}")
        return parsed

    def inductor_patches(self) -> dict[str, Any]:
        """Return the patches of Inductor's configuration, of ``mode`` and ``inductor`` together.

        Raises:
            ConfigError: for a mode or an option that this version of Inductor does not have.
        """
        if self.lowering != "inductor":
            return {}
        from torch._inductor import list_options

        try:
            patches = {**mode_options(self.mode), **self.inductor}
        except RuntimeError as error:
            raise ConfigError(str(error)) from error
        unknown = sorted(set(self.inductor) - set(list_options()))
        if unknown:
            raise ConfigError(f"Inductor has no option {unknown[0]!r}; see torch._inductor.config")
        return patches


def _check_type(name: str, value: object, types: tuple[type, ...], wanted: str) -> None:
    if not isinstance(value, types):
        raise ConfigError(f"{name}={value!r} must be {wanted}")
