#!/usr/bin/env python3
"""A training step of Hugging Face transformers' Mixtral, for `moerun bench step --baseline`.

The shape of moerun's reference step: hidden 256, 4 layers, 8 heads over 4 key heads, 8 experts top-2 of width 512,
vocabulary 8192, 8 sequences of 256 tokens; AdamW (fused) and clipping included. The last line it prints is JSON with
`tokens_per_s`, the median over the measured steps.

Needs: pip install torch==2.11.0 transformers==5.23.0
"""

import argparse
import json
import resource
import statistics
import time

import torch
from transformers import MixtralConfig, MixtralForCausalLM

BATCH, SEQUENCE, VOCABULARY, WARM_UP = 8, 256, 8192, 2


def build(experts: str, dtype: torch.dtype) -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=SEQUENCE,
        output_router_logits=True, router_aux_loss_coef=0.02, use_cache=False, tie_word_embeddings=False,
    )
    config._experts_implementation = experts
    config._attn_implementation = "sdpa"
    return MixtralForCausalLM(config).to(dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", choices=["eager", "grouped_mm", "batched_mm"], default="grouped_mm")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = build(args.experts, torch.bfloat16 if args.dtype == "bf16" else torch.float32).to(args.device)
    if args.compile:
        model = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE)).to(args.device)
    seconds, losses = [], []
    for index in range(WARM_UP + args.runs):
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
    print(json.dumps({
        "peer": f"transformers Mixtral, {args.experts}{', compiled' if args.compile else ''}",
        "dtype": args.dtype,
        "tokens_per_s": round(BATCH * SEQUENCE / median, 1),
        "step_ms": round(median * 1e3, 1),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "peak_device_mib": None if args.device == "cpu" else torch.cuda.max_memory_allocated() >> 20,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "losses": losses[:4],
    }))


if __name__ == "__main__":
    main()
