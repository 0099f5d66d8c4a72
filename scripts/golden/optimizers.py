#!/usr/bin/env python3
"""Writes a golden file: weights of single matrices after each step of torch's optimizers.

usage: scripts/golden/optimizers.py [OUTPUT]        (default: trainer/tests/golden)

optimizers.safetensors holds, for each shape ROWSxCOLUMNS:
  SHAPE/weight, SHAPE/gradients    initial values, and a gradient for each step
  SHAPE/muon/VARIANT/torch         after each step of torch.optim.Muon, which iterates in bf16
  SHAPE/muon/VARIANT/fp32          after each step of the same algorithm in fp32, written below
  SHAPE/sgd/VARIANT                after each step of torch.optim.SGD
Made with torch 2.11.0.
"""

import math
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPES = [(12, 20), (20, 12), (16, 16)]
STEPS = 5
LR = 0.02
WEIGHT_DECAY = 0.1
MUON = {
    "original": dict(nesterov=True, adjust_lr_fn="original"),
    "match_rms_adamw": dict(nesterov=True, adjust_lr_fn="match_rms_adamw"),
    "plain": dict(nesterov=False, adjust_lr_fn="original"),
}
SGD = {
    "momentum": dict(momentum=0.9, weight_decay=0.0, nesterov=False),
    "nesterov": dict(momentum=0.9, weight_decay=0.1, nesterov=True),
    "none": dict(momentum=0.0, weight_decay=0.1, nesterov=False),
}


def train(make_optimizer, weight, gradients):
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = make_optimizer([parameter])
    after = []
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
        after.append(parameter.detach().clone())
    return torch.stack(after)


def orthogonalized(matrix):
    """Five quintic Newton-Schulz iterations in fp32, on the wide side."""
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if is_tall else x


def muon_in_fp32(weight, gradients, nesterov, adjust_lr_fn, momentum=0.95):
    rows, columns = weight.shape
    scale = {
        "original": math.sqrt(max(1, rows / columns)),
        "match_rms_adamw": 0.2 * math.sqrt(max(rows, columns)),
    }[adjust_lr_fn]
    weight = weight.clone()
    mean = torch.zeros_like(weight)
    after = []
    for gradient in gradients:
        mean = momentum * mean + (1 - momentum) * gradient
        ahead = (1 - momentum) * gradient + momentum * mean if nesterov else mean
        weight = weight * (1 - LR * WEIGHT_DECAY) - LR * scale * orthogonalized(ahead)
        after.append(weight.clone())
    return torch.stack(after)


def main():
    output = Path(sys.argv[1] if len(sys.argv) > 1 else "trainer/tests/golden")
    torch.manual_seed(0)
    tensors = {}
    for shape in SHAPES:
        name = f"{shape[0]}x{shape[1]}"
        weight = torch.randn(shape)
        gradients = torch.randn(STEPS, *shape)
        tensors[f"{name}/weight"] = weight
        tensors[f"{name}/gradients"] = gradients
        for variant, options in MUON.items():
            make = lambda parameters: torch.optim.Muon(
                parameters, lr=LR, weight_decay=WEIGHT_DECAY, momentum=0.95, **options
            )
            key = f"{name}/muon/{variant}"
            tensors[f"{key}/torch"] = train(make, weight, gradients)
            tensors[f"{key}/fp32"] = muon_in_fp32(weight, gradients, **options)
        for variant, options in SGD.items():
            make = lambda parameters: torch.optim.SGD(parameters, lr=LR, **options)
            tensors[f"{name}/sgd/{variant}"] = train(make, weight, gradients)
    save_file(tensors, output / "optimizers.safetensors")


main()
