#!/usr/bin/env python3
"""Trains Hugging Face transformers' Mixtral on several ranks.

A baseline for `moerun bench layouts --baseline`: the reference step of transformers_step.py in fp32
with transformers' own expert parallelism over Gloo. Rank 0's last line is JSON with `tokens_per_s`
of all ranks together, the median over the measured steps.

usage: python3 -m torch.distributed.run --nproc_per_node 2 transformers_ep.py
Needs: pip install torch==2.11.0 transformers==5.23.0 accelerate
"""

import argparse
import json
import statistics
import tempfile
import time

import torch
import torch.distributed as distributed
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from transformers_step import REFERENCE, build

WARM_UP = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    # Every rank reads its part of the same initial weights.
    place = [tempfile.mkdtemp() if rank == 0 else None]
    distributed.broadcast_object_list(place)
    if rank == 0:
        torch.manual_seed(0)
        build(REFERENCE, "grouped_mm", torch.float32, balance=0.02).save_pretrained(place[0])
    distributed.barrier()
    parallel = DistributedConfig(tp_size=ranks, ep_size=ranks)
    model = AutoModelForCausalLM.from_pretrained(
        place[0], dtype=torch.float32, distributed_config=parallel
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, foreach=False
    )
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(
        0, REFERENCE["vocabulary"], (REFERENCE["batch"], REFERENCE["sequence"]), generator=draw
    )
    seconds, losses = [], []
    for index in range(WARM_UP + args.steps):
        distributed.barrier()
        start = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        distributed.barrier()
        losses.append(round(loss.item(), 5))
        if index >= WARM_UP:
            seconds.append(time.perf_counter() - start)
    if rank == 0:
        rate = tokens.numel() / statistics.median(seconds)
        line = {
            "peer": "transformers Mixtral, expert parallel",
            "ranks": ranks,
            "tokens_per_s": round(rate, 1),
            "losses": losses,
        }
        print(json.dumps(line), flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
