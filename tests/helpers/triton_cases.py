"""Runs the Triton kernels in a process of their own, and prints the results as JSON.

``python triton_cases.py interpret`` compares them with the reference (the environment must hold
TRITON_INTERPRET=1, which Triton reads when it is imported); ``python triton_cases.py compile``
compiles them for CUDA devices, which needs no GPU.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from helpers.guarded_sites import gated_site, plain_site

from nbl_compiler.lowering.guarded_ffn import reference
from nbl_compiler.lowering.guarded_site import GuardedFFN

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SITES: dict[str, Callable[..., GuardedFFN]] = {
    "exact": lambda **k: plain_site(exact=True, scored=False, activation="gelu", **k),
    "certified": lambda **k: plain_site(
        "quantized_8", exact=True, capacity=40, activation="relu2", **k
    ),
    "ranges, low rank, truncated": lambda **k: plain_site(
        "low_rank", overflow="truncate", capacity=3, activation="relu", **k
    ),
    "gated, 4 bits, truncated": lambda **k: gated_site("quantized_4", activation="silu", **k),
    "gated, 2 bits, threshold": lambda **k: gated_site(
        "quantized_2", overflow="dense", capacity=120, threshold=0.05, activation="quick_gelu", **k
    ),
    "predicted values": lambda **k: gated_site(
        "quantized_8", values="predicted", activation="silu", **k
    ),
    "predicted values, plain, threshold": lambda **k: plain_site(
        "low_rank", capacity=14, activation="gelu", values="predicted", **k
    ),
    "gated, no predictor": lambda **k: gated_site(
        overflow="dense", capacity=117, threshold=0.05, activation="gelu_tanh", **k
    ),
}
INTERPRETED = [
    *((name, tokens, "float32", 60, 131) for name in SITES for tokens in (1, 63)),
    *((name, tokens, "bfloat16", 60, 131) for name, tokens in zip(SITES, 4 * (3, 63), strict=True)),
    *((name, tokens, "float16", 60, 131) for name, tokens in zip(SITES, 4 * (63, 3), strict=True)),
    ("gated, 4 bits, truncated", 3, "bfloat16", 896, 65),
    ("certified", 63, "float32", 896, 65),
]
COMPILED = [
    ("certified", 1, "float32"),
    ("gated, 4 bits, truncated", 1, "bfloat16"),
    ("gated, 4 bits, truncated", 63, "bfloat16"),
    ("predicted values", 1, "bfloat16"),
    ("predicted values", 63, "bfloat16"),
]
TARGETS = (80, 90)
"""Compute capabilities: A100, H100 and H200."""


def interpret() -> list[dict[str, Any]]:
    """Compare every case with the reference; uninitialised memory holds NaN."""
    from nbl_compiler.lowering.triton_guarded_ffn import run, supported

    torch.use_deterministic_algorithms(True)
    return [_interpreted(run, supported, *case) for case in INTERPRETED]


def _interpreted(
    run: Any, supported: Any, name: str, tokens: int, dtype: str, width: int, neurons: int
) -> dict[str, Any]:
    torch.manual_seed(0)
    site = SITES[name](dtype=DTYPES[dtype], width=width, neurons=neurons)
    x = torch.randn(tokens, width).to(DTYPES[dtype])
    if tokens > 1:
        x[1, 0] = float("nan")
    assert supported(site, x)
    wanted, found = reference(site, x), run(site, x)
    difference = (wanted.output.float() - found.output.float()).abs()
    return {
        "case": [name, tokens, dtype, width, neurons],
        "error": float(difference.nan_to_num().max()),
        "same_nan": torch.equal(wanted.output.isnan(), found.output.isnan()),
        "same_outliers": torch.equal(wanted.outliers, found.outliers),
        "same_dense": torch.equal(wanted.dense, found.dense),
        "dense": int(wanted.dense.sum()),
    }


def compile_all() -> list[dict[str, Any]]:
    """Compile every kernel that the cases launch, in the variants they launch."""
    from triton.runtime.jit import JITFunction

    from nbl_compiler.lowering import triton_guarded_ffn

    results: list[dict[str, Any]] = []
    done: set[str] = set()

    def launch(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        results.extend(_compiled(self, arguments, options, done))

    JITFunction.run = launch
    for name, tokens, dtype in COMPILED:
        site = SITES[name](dtype=DTYPES[dtype], width=896, neurons=528)
        triton_guarded_ffn.run(site, torch.randn(tokens, 896).to(DTYPES[dtype]))
    return results


def _compiled(
    kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any], done: set[str]
) -> list[dict[str, Any]]:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    warps = {"num_warps": options.pop("num_warps")} if "num_warps" in options else {}
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | options
    signature, constants, divisible = {}, {}, {}
    for parameter in kernel.params:
        value = values[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(parameter.num,)] = value
            continue
        signature[parameter.name] = _type(value)
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            divisible[(parameter.num,)] = [["tt.divisibility", 16]]
    key = f"{kernel.__name__} {signature} {constants}"
    if key in done:
        return []
    done.add(key)
    results = []
    for capability in TARGETS:
        source = ASTSource(kernel, signature, constants, divisible)
        built = compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=warps)
        ptx = built.asm["ptx"]
        results.append(
            {
                "kernel": kernel.__name__,
                "capability": capability,
                "vector_loads": ptx.count("ld.global.v4") + ptx.count("cp.async"),
                "tensor_cores": ptx.count("mma.sync") + ptx.count("wgmma"),
                "shared_bytes": built.metadata.shared,
            }
        )
    return results


def _type(value: Any) -> str:
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int):
        return "i32"
    names = {
        torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
        torch.int32: "i32", torch.int8: "i8", torch.uint8: "u8",
    }  # fmt: skip
    return "*" + names[value.dtype]


if __name__ == "__main__":
    print(json.dumps({"interpret": interpret, "compile": compile_all}[sys.argv[1]]()))
