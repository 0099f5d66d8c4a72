#!/usr/bin/env python3
"""Trains Hugging Face transformers' Mixtral in one process.

A baseline for `moerun bench step --baseline`, with the shapes of moerun's reference steps (default:
hidden 256, 4 layers, 8 heads over 4 key heads, 8 experts top-2 of width 512, vocabulary 8192, 8
sequences of 256 tokens). Fused AdamW and clipping are included. With --start it loads the weights
and tokens that `moerun bench step` has written. The last line is JSON with `tokens_per_s`, the
median over the measured steps.

Needs: pip install torch==2.11.0 transformers==5.23.0
"""

import argparse
import json
import resource
import statistics
import time

import torch
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

WARM_UP, COMPARED = 2, 20
REFERENCE = dict(
    hidden=256,
    layers=4,
    heads=8,
    kv_heads=4,
    experts=8,
    top_k=2,
    ffn=512,
    batch=8,
    sequence=256,
    vocabulary=8192,
)
SHAPES = {
    "reference": REFERENCE,
    "long": {**REFERENCE, "experts": 16, "top_k": 4, "batch": 1, "sequence": 2048},
    "wide": {**REFERENCE, "hidden": 768, "layers": 2, "heads": 12, "ffn": 1536},
    "olmoe": dict(
        hidden=2048,
        layers=4,
        heads=16,
        kv_heads=16,
        experts=64,
        top_k=8,
        ffn=1024,
        batch=2,
        sequence=4096,
        vocabulary=50304,
    ),
    "coarse": dict(
        hidden=4096,
        layers=1,
        heads=32,
        kv_heads=8,
        experts=8,
        top_k=2,
        ffn=14336,
        batch=2,
        sequence=4096,
        vocabulary=32000,
    ),
}


def build(shape: dict, experts: str, dtype: torch.dtype, balance: float) -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["ffn"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        num_local_experts=shape["experts"],
        num_experts_per_tok=shape["top_k"],
        max_position_embeddings=shape["sequence"],
        output_router_logits=True,
        router_aux_loss_coef=balance,
        use_cache=False,
        tie_word_embeddings=False,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
    )
    config._experts_implementation = experts
    config._attn_implementation = "sdpa"
    return MixtralForCausalLM(config).to(dtype)


def load_start(model: MixtralForCausalLM, start: dict) -> None:
    """Loads weights that have moerun's names."""
    top = {
        "model.embed_tokens.weight": "embedding",
        "model.norm.weight": "norm",
        "lm_head.weight": "head",
    }
    inside = {
        "input_layernorm.weight": "attention_norm",
        "post_attention_layernorm.weight": "feed_forward_norm",
        "self_attn.q_proj.weight": "attention.query",
        "self_attn.k_proj.weight": "attention.key",
        "self_attn.v_proj.weight": "attention.value",
        "self_attn.o_proj.weight": "attention.output",
        "mlp.gate.weight": "moe.gate",
        "mlp.experts.gate_up_proj": "gate_up",
        "mlp.experts.down_proj": "down",
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in top:
                parameter.copy_(start[top[name]])
                continue
            _, _, layer, rest = name.split(".", 3)
            if rest.startswith("mlp.experts"):
                for expert, part in enumerate(parameter):
                    part.copy_(start[f"layers.{layer}.moe.experts.{expert}.{inside[rest]}"])
            else:
                parameter.copy_(start[f"layers.{layer}.{inside[rest]}"])


class RoundRobinRouter(MixtralTopKRouter):
    """Selects experts round-robin, regardless of their scores. Routing weights stay the same."""

    def forward(self, hidden_states):
        logits, _, best = super().forward(hidden_states)
        turns = (
            torch.arange(best.numel(), device=best.device).remainder(self.num_experts).view_as(best)
        )
        weights = logits.float().softmax(-1).gather(-1, turns)
        return logits, weights / weights.sum(-1, keepdim=True), turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--experts", choices=["eager", "grouped_mm", "batched_mm"], default="grouped_mm"
    )
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--shape", choices=list(SHAPES), default="reference")
    parser.add_argument("--start", help="a file with the first weights and the tokens")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--force-balance", action="store_true", help="choose experts round-robin")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    shape = SHAPES[args.shape]
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    model = build(shape, args.experts, dtype, 0.0 if args.force_balance else 0.02).to(args.device)
    if args.force_balance:
        for layer in model.model.layers:
            layer.mlp.gate.__class__ = RoundRobinRouter
    tokens = torch.randint(0, shape["vocabulary"], (shape["batch"], shape["sequence"])).to(
        args.device
    )
    if args.start:
        start = load_file(args.start, device=args.device)
        load_start(model, start)
        tokens = start["tokens"]
    if args.compile:
        model = torch.compile(model)
    # No weight decay on norms, as in moerun.
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), fused=True)
    seconds, losses = [], []
    for index in range(WARM_UP + args.steps):
        start = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if args.device != "cpu":
            torch.cuda.synchronize()
        losses.append(round(loss.item(), 5))
        if index >= WARM_UP:
            seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    print(
        json.dumps(
            {
                "peer": f"transformers Mixtral, {args.experts}"
                + (", compiled" if args.compile else ""),
                "dtype": args.dtype,
                "shape": args.shape,
                "tokens_per_s": round(shape["batch"] * shape["sequence"] / median, 1),
                "step_ms": round(median * 1e3, 1),
                "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                "peak_device_mib": (
                    None if args.device == "cpu" else torch.cuda.max_memory_allocated() >> 20
                ),
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "losses": losses[:COMPARED],
            }
        )
    )


if __name__ == "__main__":
    main()
