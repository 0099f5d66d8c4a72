#!/usr/bin/env python3
"""Loads the folder of a model with transformers in bf16, and prints seconds and memory as JSON.

usage: scripts/peers/from_pretrained.py FOLDER      (baseline of `moerun bench import --baseline`)
"""

import json
import resource
import sys
import time

import torch
from transformers import AutoModelForCausalLM

started = time.monotonic()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
seconds = time.monotonic() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
parameters = sum(parameter.numel() for parameter in model.parameters())
print(
    json.dumps(
        {
            "seconds": seconds,
            "peak_resident_mib": round(peak / 1024, 1),
            "weights_mib": round(2 * parameters / 2**20, 1),
        }
    )
)
