"""Prefill and decode of a published shape with random weights, against dense Inductor.

    python benchmarks/model_speed.py --count 12 --prefill 2048 --decode 512,4096
    python benchmarks/model_speed.py --count 0 --ffn 24 --keep 0.25 --prefill 512 --decode 512

Speed does not depend on the values of the weights, so a random plan stands for a calibrated one.
Refuses to time what does not pass its numeric check.
"""

from __future__ import annotations

import argparse
import json

import torch
from rich.console import Console
from torch import nn

from nbl_compiler import speed
from nbl_compiler.cost import measure_machine
from nbl_compiler.fingerprint import sketch
from nbl_compiler.plans import Plan, Site
from nbl_compiler.speed_table import as_rows, speed_table

# d 896, 24 layers, 14 query and 2 key/value heads, FFN 4,864, vocabulary 151,936, tied head.
QWEN_05B = {
    "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4_864,
    "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
    "max_position_embeddings": 32_768, "tie_word_embeddings": True,
}  # fmt: skip
# Logits of a random model are of order one; a wrong rewrite misses by as much.
NUMERIC_TOLERANCE = 1e-3


def random_plan(model: nn.Module, count: int, ffn: int, keep: float) -> Plan:
    """Return a plan that linearizes attention layers and folds FFNs, with random maps.

    Args:
        model: A decoder laid out as Llama.
        count: Attention layers to linearize, evenly spread.
        ffn: FFNs to fold, likewise.
        keep: Share of the neurons that stay dense in these.
    """
    sites = []
    for kind, suffix, wanted in (("attention", "self_attn", count), ("ffn", "mlp", ffn)):
        names = [name for name, _ in model.named_modules() if name.endswith(suffix)]
        step = max(len(names) // max(wanted, 1), 1)
        chosen = set(names[step - 1 :: step][:wanted])
        for name in names:
            block = model.get_submodule(name)
            tensors, details = attention_map(model) if kind == "attention" else folded(block, keep)
            details["parameters"] = sum(p.numel() for p in block.parameters())
            decision = "rewritten" if name in chosen else "kept"
            used = tensors if name in chosen else {}
            sites.append(Site(name, kind, decision, "random", tensors=used, details=details))
    return Plan(tuple(sites), tuple(sketch(p) for p in model.parameters()), "random weights")


def attention_map(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """Return a random linear map of the model's width."""
    width = model.config.hidden_size
    tensors = {"weight": torch.randn(width, width) * 0.02, "bias": torch.zeros(width)}
    return tensors, {"input": "normed"}


def folded(block: nn.Module, keep: float) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """Return a folded FFN: the first neurons kept, a random map for the others."""
    neurons, width = block.up_proj.weight.shape
    k = round(keep * neurons)
    tensors = {
        "kept": torch.arange(k),
        "down": block.down_proj.weight[:, :k].detach().clone(),
        "weight": torch.randn(width, width) * 0.02,
        "bias": torch.zeros(width),
    }
    read = 3 * k * width + width * width + width
    details = {
        "form": "keep+fold", "activation": "silu", "gated": True, "neurons": neurons, "kept": k,
        "width_in": width, "width_out": width, "parameters_read": read,
    }  # fmt: skip
    return tensors, details


def check(model: nn.Module, plan: Plan, pair: tuple[speed.Contender, speed.Contender]) -> None:
    """Compare the compiled plan with plain module surgery before anything is timed."""
    ids = torch.arange(1, 17)[None]
    linear, hooks = nn.functional.linear, []
    for site in plan.rewritten:
        module = model.get_submodule(site.name)

        def attention(module, args, kwargs, output, t=site.tensors):
            return linear(kwargs["hidden_states"], t["weight"], t["bias"]), None

        def ffn(module, args, kwargs, output, t=site.tensors):
            gate, up = (
                linear(args[0], p.weight[t["kept"]]) for p in (module.gate_proj, module.up_proj)
            )
            kept = linear(nn.functional.silu(gate) * up, t["down"])
            return kept + linear(args[0], t["weight"], t["bias"])

        hook = attention if site.kind == "attention" else ffn
        hooks.append(module.register_forward_hook(hook, with_kwargs=True))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    torch._dynamo.reset()
    torch.testing.assert_close(
        pair[1].forward(ids, use_cache=False).logits, expected,
        atol=NUMERIC_TOLERANCE, rtol=NUMERIC_TOLERANCE,
    )  # fmt: skip


def main() -> None:
    """Print measured and predicted speed-ups."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--ffn", type=int, default=0, help="FFNs to fold")
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--prefill", default="2048")
    parser.add_argument("--decode", default="512,4096")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**QWEN_05B)).eval()
    plan = random_plan(model, args.count, args.ffn, args.keep)
    machine = measure_machine(width=QWEN_05B["hidden_size"])
    with speed.measuring():
        pair = speed.contenders(model, plan)
        check(model, plan, pair)
        size = QWEN_05B["vocab_size"]
        rows = []
        for context in (int(n) for n in args.decode.split(",") if n):
            rows.append(speed.decode(pair, size, context, machine, args.repeats))
        for length in (int(n) for n in args.prefill.split(",") if n):
            rows.append(speed.prefill(pair, size, length, machine, max(args.repeats // 2, 1)))
        seconds = [c.compile_seconds for c in pair]
    if args.json:
        print(json.dumps({"rows": as_rows(rows), "compile_seconds": seconds}, indent=2))
        return
    console = Console()
    console.print(
        f"shape of Qwen2.5-0.5B, {args.count} of 24 attention layers linearized, {args.ffn} FFNs "
        f"folded with {args.keep:.0%} kept"
    )
    console.print(speed_table(rows))
    console.print(f"compile seconds: dense {seconds[0]:.1f}, nbl {seconds[1]:.1f}")


if __name__ == "__main__":
    main()
