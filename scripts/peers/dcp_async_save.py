#!/usr/bin/env python3
"""Measures how long torch.distributed.checkpoint.async_save stalls training.

A baseline for `moerun bench snapshot --baseline`. One process saves a state of fp32 tensors several
times and ends with a JSON line: the median time until async_save returns (stall_ms) and until the
state is on disk (total_ms). Needs torch 2.11.0.
"""

import argparse
import json
import os
import statistics
import tempfile
import time

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--mib", type=int, default=256, help="size of the state")
parser.add_argument("--saves", type=int, default=4, help="measured saves, after one that warms up")
parser.add_argument("--tensors", type=int, default=16, help="tensors that it consists of")
options = parser.parse_args()

store = dist.TCPStore("127.0.0.1", 0, 1, True)
dist.init_process_group("cpu:gloo", store=store, rank=0, world_size=1)
values = options.mib * 2**20 // 4 // options.tensors
state = {f"weight.{i}": torch.full((values,), float(i)) for i in range(options.tensors)}
stalls, totals = [], []
with tempfile.TemporaryDirectory() as folder:
    for number in range(options.saves + 1):
        begun = time.perf_counter()
        saving = dcp.async_save(state, checkpoint_id=os.path.join(folder, str(number)))
        returned = time.perf_counter()
        saving.result()
        if number > 0:
            stalls.append((returned - begun) * 1e3)
            totals.append((time.perf_counter() - begun) * 1e3)
dist.destroy_process_group()
print(
    json.dumps(
        {
            "stall_ms": statistics.median(stalls),
            "total_ms": statistics.median(totals),
            "mib": options.mib,
        }
    )
)
