"""vLLM serving a plan against stock vLLM: offline throughput, and tokens that the KV cache holds.

    python benchmarks/vllm_throughput.py --shape qwen2.5-0.5b --count 12 --ffn 24
    python benchmarks/vllm_throughput.py --shape gemma-3-270m --count 4

Random maps stand for calibrated ones, and random weights in a published shape for the model's own:
speed depends on neither. Each engine runs in a process of its own, one after the other. Refuses to
time an engine whose log-probabilities are not those of the plan in transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from model_speed import QWEN_05B, random_plan
from rich.console import Console
from rich.table import Table

from nbl_compiler.plans import Plan
from nbl_compiler.serving.export import export

# Log-probabilities of the same weights, summed in another order; a wrong map misses by order one.
TOLERANCE = {"float32": 1e-2, "bfloat16": 0.5}
CHECKED_TOKENS = 32


def main() -> None:
    """Print the table."""
    args = arguments().parse_args()
    if args.engine:
        print(json.dumps(measure(args)))
        return
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        stock, planned = prepare(args, Path(folder))
        results = {"stock": run(args, stock), "plan": run(args, planned)}
    Console().print(table(results))
    if args.json:
        args.json.write_text(json.dumps({"arguments": vars(args), **results}, default=str))


def arguments() -> argparse.ArgumentParser:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=["qwen2.5-0.5b", "gemma-3-270m"], default="qwen2.5-0.5b")
    parser.add_argument("--plan", type=Path, help="of gemma-3-270m, instead of random maps")
    parser.add_argument("--count", type=int, default=12, help="attention layers to linearize")
    parser.add_argument("--ffn", type=int, default=0, help="FFNs to fold")
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--batch", default="1,8,32")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate for each")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="float32")
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--kv-gib", type=int, default=1, help="memory of the KV cache")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--scratch", help="where the models go meanwhile")
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    return parser


def prepare(args: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """Return the folders of the dense model and of the plan, with what each must answer."""
    model, source = load(args, folder)
    if args.plan:
        plan = Plan.load(args.plan)
    else:
        plan = random_plan(model, args.count, args.ffn, args.keep)
        plan = replace(plan, sites=tuple(with_activation(site, model) for site in plan.sites))
    export(source, plan, folder / "plan")
    answers = {source: expected(model, Plan()), folder / "plan": expected(model, plan)}
    for name, logprobs in answers.items():
        torch.save(logprobs, folder / f"{name.name}.answers")
    return source, folder / "plan"


def load(args: argparse.Namespace, folder: Path) -> tuple[Any, Path]:
    """Return the model and a folder that holds it in the dtype that is served."""
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

    from nbl_compiler.models import GEMMA, resolve

    dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)
    if args.shape == GEMMA:
        model = AutoModelForCausalLM.from_pretrained(resolve(GEMMA), dtype=dtype)
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**QWEN_05B)).to(dtype)
    model.save_pretrained(folder / "stock")
    return model.eval(), folder / "stock"


def with_activation(site: Any, model: Any) -> Any:
    """Return a site with the activation of this model's FFNs."""
    if site.kind != "ffn":
        return site
    gelu = model.config.model_type.startswith("gemma")
    name = "gelu_tanh" if gelu else "silu"
    return replace(site, details={**site.details, "activation": name})


def checked_prompt() -> list[int]:
    """Return the tokens whose log-probabilities are compared."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(10, 10_000, (CHECKED_TOKENS,), generator=generator).tolist()


def expected(model: Any, plan: Plan) -> torch.Tensor:
    """Return what transformers with the plan says of the checked prompt, [tokens − 1]."""
    torch._dynamo.reset()
    run = torch.compile(model, backend="nbl", options={"plan": plan, "lowering": "eager"})
    ids = torch.tensor([checked_prompt()])
    with torch.inference_mode():
        logprobs = run(ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    return logprobs.gather(-1, ids[0, 1:, None]).squeeze(-1)


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure one engine in a process of its own."""
    words = [sys.executable, __file__, *sys.argv[1:], "--engine", str(folder)]
    variables = {
        "VLLM_CPU_KVCACHE_SPACE": str(args.kv_gib),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # bound threads leave one core idle
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine's own time, without messages
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    done = subprocess.run(
        words, stdout=subprocess.PIPE, text=True, env={**os.environ, **variables}, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the KV cache's capacity, and of each batch size tokens a second."""
    from vllm import LLM, SamplingParams

    folder = Path(args.engine)
    engine = LLM(
        str(folder), skip_tokenizer_init=True, dtype=args.dtype, enforce_eager=args.eager,
        max_model_len=args.max_model_len, max_num_seqs=64, enable_prefix_caching=False,
        distributed_executor_backend="uni", seed=0,
    )  # fmt: skip
    check(engine, folder.parent / f"{folder.name}.answers", TOLERANCE[args.dtype])
    cache = engine.llm_engine.vllm_config.cache_config
    result: dict[str, Any] = {"kv_tokens": cache.kv_cache_size_tokens}
    wanted = SamplingParams(temperature=0, max_tokens=args.new, ignore_eos=True, detokenize=False)
    generator = torch.Generator().manual_seed(0)
    for batch in (int(item) for item in args.batch.split(",")):
        prompts = torch.randint(10, 10_000, (batch, args.prompt), generator=generator).tolist()
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        seconds = []
        for _ in range(args.repeats + 1):
            started = time.perf_counter()
            engine.generate(inputs, wanted, use_tqdm=False)
            seconds.append(time.perf_counter() - started)
        timed = seconds[1:]  # the first warms up
        result[str(batch)] = {
            "tokens_per_second": batch * args.new / statistics.median(timed),
            "spread": (max(timed) - min(timed)) / statistics.median(timed),
        }
    return result


def check(engine: Any, answers: Path, tolerance: float) -> None:
    """Raise unless the engine says of the checked prompt what transformers says."""
    from vllm import SamplingParams

    prompt = checked_prompt()
    wanted = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    (made,) = engine.generate([{"prompt_token_ids": prompt}], wanted, use_tqdm=False)
    rows = zip(made.prompt_logprobs[1:], prompt[1:], strict=True)
    found = torch.tensor([row[token].logprob for row, token in rows])
    torch.testing.assert_close(found, torch.load(answers), rtol=0, atol=tolerance)


def table(results: dict[str, dict[str, Any]]) -> Table:
    """Return what was measured, a row for each batch size and one for the cache."""
    made = Table("", "stock vLLM", "plan", "ratio", "spread")
    for key, before in results["stock"].items():
        after = results["plan"][key]
        if key == "kv_tokens":
            made.add_row("KV cache, tokens", f"{before:,}", f"{after:,}", f"{after / before:.2f}")
            continue
        old, new = before["tokens_per_second"], after["tokens_per_second"]
        made.add_row(
            f"batch {key}, new tokens/s", f"{old:.1f}", f"{new:.1f}", f"{new / old:.2f}",
            f"{max(before['spread'], after['spread']):.0%}",
        )  # fmt: skip
    return made


if __name__ == "__main__":
    main()
