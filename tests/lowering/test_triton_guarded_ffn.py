"""The Triton kernels: equal to the reference in the interpreter, and compiled for CUDA devices.

Both need a process of their own: Triton decides on its import whether it interprets.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.guarded_sites import gated_site
from helpers.triton_cases import COMPILED, INTERPRETED, TARGETS

from nbl_compiler.lowering.guarded_ffn import reference, run

TESTS = Path(__file__).parents[1]

# Float32 sums in another order; one rounding of the output (|y| < 8), and of the tiles' residuals.
TOLERANCE = {"float32": 2e-5, "bfloat16": 6e-2, "float16": 8e-3}
SHARED_BYTES = 96 * 1024
"""Shared memory that a program may use on every target."""


def _results(mode: str, interpret: bool) -> list[dict[str, Any]]:
    paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    environment["TRITON_INTERPRET"] = "1" if interpret else "0"
    finished = subprocess.run(
        [sys.executable, str(TESTS / "helpers" / "triton_cases.py"), mode],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    results: list[dict[str, Any]] = json.loads(finished.stdout.splitlines()[-1])
    return results


@pytest.fixture(scope="module")
def interpreted() -> dict[tuple[Any, ...], dict[str, Any]]:
    return {tuple(result["case"]): result for result in _results("interpret", True)}


@pytest.mark.parametrize("case", INTERPRETED, ids=str)
def test_kernels_equal_the_reference(
    interpreted: dict[tuple[Any, ...], dict[str, Any]], case: tuple[Any, ...]
) -> None:
    result = interpreted[case]
    assert result["same_outliers"]
    assert result["same_dense"]
    assert result["same_nan"]
    assert result["error"] <= TOLERANCE[case[2]]


def test_cases_mix_dense_and_guarded_tokens(
    interpreted: dict[tuple[Any, ...], dict[str, Any]],
) -> None:
    mixed = [r for r in interpreted.values() if 1 < r["dense"] < r["case"][1]]
    assert {r["case"][0] for r in mixed} >= {"exact", "gated, no predictor"}


def test_kernels_compile_for_cuda() -> None:
    """Every kernel, with 16-byte loads and matrix units, within the shared memory."""
    results = _results("compile", False)
    kernels = {r["kernel"] for r in results}
    assert kernels == {
        "affine_kernel", "flag_kernel", "select_kernel", "residual_kernel", "gather_down_kernel",
        "combine_kernel", "affine_tile_kernel", "flag_tile_kernel", "hidden_tile_kernel",
        "down_tile_kernel",
    }  # fmt: skip
    assert {r["capability"] for r in results} == set(TARGETS)
    assert len(results) >= len(COMPILED) * len(TARGETS)
    for result in results:
        name = result["kernel"]
        assert result["shared_bytes"] <= SHARED_BYTES
        if name not in ("combine_kernel", "select_kernel"):
            assert result["vector_loads"] > 0, name
        if name.endswith("tile_kernel"):
            assert result["tensor_cores"] > 0, name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="runs on a GPU")
@pytest.mark.parametrize("tokens", [1, 3, 16, 63])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_op_on_a_gpu(tokens: int, dtype: torch.dtype) -> None:
    """The op's kernel on the device, also inside a CUDA graph, against the reference there."""
    from dataclasses import replace

    from nbl_compiler.lowering import triton_guarded_ffn  # noqa: F401  registers the kernels

    site = gated_site("quantized_4", dtype=dtype, width=896, neurons=1000)
    moved = {
        name: value.cuda() for name, value in vars(site).items() if isinstance(value, torch.Tensor)
    }
    site = replace(site, **moved, predictor=[t.cuda() for t in site.predictor])
    x = torch.randn(tokens, 896, device="cuda").to(dtype)
    wanted = reference(site, x)
    tolerance = TOLERANCE[str(dtype).removeprefix("torch.")]
    torch.testing.assert_close(run(site, x).output, wanted.output, atol=tolerance, rtol=1e-2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(site, x)
    graph.replay()
    torch.testing.assert_close(captured.output, wanted.output, atol=tolerance, rtol=1e-2)
