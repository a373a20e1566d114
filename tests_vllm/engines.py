"""vLLM at work, and what transformers makes of the same plan.

Run as a script it serves in processes of its own, as a user's program would:
``python engines.py FOLDER RESULT '{"tensor_parallel_size": 2}'``.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tiny_plans import VOCABULARY, prompts
from torch import Tensor

from nbl_compiler.plans import Plan

NEW_TOKENS = 6
SETTINGS = {
    "skip_tokenizer_init": True,
    "dtype": "float32",
    "max_model_len": 64,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 16,  # prompts are longer: they are prefilled in chunks
    "block_size": 32,  # the longest prompts fill one, so that prefixes can be found again
    "max_logprobs": VOCABULARY,
    "seed": 0,
}
IN_THIS_PROCESS = {"distributed_executor_backend": "uni", "enforce_eager": True}


@dataclass(frozen=True)
class Served:
    """What came back for the prompts.

    Args:
        logprobs: Of each prompt, log-probabilities of its tokens but the first, [length − 1, V].
        tokens: Of each prompt, the tokens that were chosen greedily.
        again: The same of a second run, which finds the long prompts' prefixes in the cache.
        blocks: Blocks of the KV cache.
    """

    logprobs: list[Tensor]
    tokens: list[list[int]]
    again: list[list[int]] = field(default_factory=list)
    blocks: int = 0


def serve(folder: Path, **settings: Any) -> Served:
    """Start an engine, send it all prompts at once, and shut it down."""
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    engine = LLM(str(folder), **{**SETTINGS, **settings})
    greedy = {"temperature": 0, "max_tokens": NEW_TOKENS, "detokenize": False, "ignore_eos": True}
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts()]
    scored = SamplingParams(prompt_logprobs=VOCABULARY, **greedy)
    results = engine.generate(inputs, scored, use_tqdm=False)
    again = engine.generate(inputs, SamplingParams(**greedy), use_tqdm=False)
    found = [result.num_cached_tokens or 0 for result in again]
    assert max(found) >= SETTINGS["block_size"], found
    blocks = engine.llm_engine.vllm_config.cache_config.num_gpu_blocks
    engine.llm_engine.engine_core.shutdown()
    del engine
    cleanup_dist_env_and_memory()
    return Served(
        [_table(result.prompt_logprobs) for result in results],
        [list(result.outputs[0].token_ids) for result in results],
        [list(result.outputs[0].token_ids) for result in again],
        blocks,
    )


def _table(positions: list[Any]) -> Tensor:
    rows = [[found[i].logprob for i in range(VOCABULARY)] for found in positions[1:]]
    return torch.tensor(rows).reshape(-1, VOCABULARY)


def run_in_transformers(model: hf.PreTrainedModel, plan: Plan) -> Served:
    """Apply the plan by this package's backend, prompt by prompt, without a cache."""
    torch._dynamo.reset()
    options = {"plan": plan, "lowering": "eager", "strict": True}
    run = torch.compile(model, backend="nbl", options=options, dynamic=True)
    logprobs, tokens = [], []
    with torch.inference_mode():
        for prompt in prompts():
            ids = list(prompt)
            for _ in range(NEW_TOKENS):
                logits = run(torch.tensor([ids]), use_cache=False).logits[0]
                ids.append(int(logits[-1].argmax()))
            logprobs.append(logits[: len(prompt) - 1].log_softmax(-1))
            tokens.append(ids[len(prompt) :])
    return Served(logprobs, tokens)


if __name__ == "__main__":
    served = serve(Path(sys.argv[1]), **json.loads(sys.argv[3]))
    torch.save(asdict(served), sys.argv[2])
