#!/usr/bin/env python3
"""Writes frequencies of rotary position embedding as Hugging Face transformers computes them.

usage: scripts/golden/rope.py [OUTPUT]     (default: trainer/tests/golden/rope.json)

To add a case, add a line to CASES: moerun's section `model.rope` and the parameters of transformers
for the same function. The test is in trainer/src/model/rope.rs.
Made with torch 2.11.0 and transformers 5.23.0.
"""

import json
import sys
from pathlib import Path

from transformers import DeepseekV3Config, HunYuanMoEV1Config, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention
from transformers.models.hunyuan_v1_moe.modeling_hunyuan_v1_moe import HunYuanMoEV1RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

LISTS = {
    "short": [1 + i / 4 for i in range(8)],
    "long": [1.5 ** (i + 1) for i in range(8)],
}
LONGROPE = dict(short_factor=LISTS["short"], long_factor=LISTS["long"])
KIMI = dict(factor=32.0, beta_fast=1.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0)
DEEPSEEK = dict(factor=40.0, mscale=0.7, mscale_all_dim=0.9)
LLAMA3 = dict(low_freq_factor=1.0, high_freq_factor=4.0)
# Name, moerun's scaling and fraction, theta, head_dim, length; type and parameters of transformers.
# `original` is the length of pretraining; moerun has it in the scaling, except for `linear`.
CASES = [
    ("default", {}, 12345.0, 128, 64, "default", {}),
    ("partial", {"fraction": 0.5}, 1e6, 12, 64, "default", {}),
    ("linear", {"scaling": {"linear": {"factor": 2.5}}}, 1e4, 64, 64, "linear", {"factor": 2.5}),
    (
        "dynamic below the original length",
        {"scaling": {"dynamic": {"factor": 4.0, "original_length": 2048}}},
        1e4, 64, 1024, "dynamic", {"factor": 4.0, "original": 2048},
    ),
    (
        "dynamic above the original length",
        {"scaling": {"dynamic": {"factor": 4.0, "original_length": 2048}}, "fraction": 0.5},
        1e4, 64, 5000, "dynamic", {"factor": 4.0, "original": 2048},
    ),
    (
        "hunyuan",
        {"scaling": {"ntk_alpha": {"alpha": 1000.0}}},
        1e4, 128, 64, "ntk_alpha", {"alpha": 1000.0, "factor": 1.0},
    ),
    (
        "llama 3.1",
        {"scaling": {"llama3": {"factor": 8.0, "low": 1.0, "high": 4.0, "original_length": 8192}}},
        5e5, 128, 64, "llama3", {"factor": 8.0, "original": 8192, **LLAMA3},
    ),
    (
        "partial llama3",
        {
            "scaling": {
                "llama3": {"factor": 4.0, "low": 1.0, "high": 4.0, "original_length": 512}
            },
            "fraction": 0.25,
        },
        1e4, 64, 64, "llama3", {"factor": 4.0, "original": 512, **LLAMA3},
    ),
    (
        "yarn",
        {"scaling": {"yarn": {"factor": 4.0, "original_length": 32768}}},
        1e6, 128, 64, "yarn", {"factor": 4.0, "original": 32768},
    ),
    (
        "gpt-oss",
        {"scaling": {"yarn": {"factor": 32.0, "original_length": 4096, "truncate": False}}},
        150000.0, 64, 64, "yarn", {"factor": 32.0, "original": 4096, "truncate": False},
    ),
    (
        "kimi k2",
        {"scaling": {"yarn": {**KIMI, "original_length": 4096}}},
        5e4, 64, 64, "yarn", {**KIMI, "original": 4096},
    ),
    (
        "deepseek",
        {"scaling": {"yarn": {**DEEPSEEK, "original_length": 4096}}},
        1e4, 64, 64, "yarn", {**DEEPSEEK, "original": 4096},
    ),
    (
        "yarn with an attention factor",
        {"scaling": {"yarn": {"factor": 8.0, "original_length": 100, "attention_factor": 1.25}},
         "fraction": 0.5},
        1e4, 128, 64, "yarn", {"factor": 8.0, "original": 100, "attention_factor": 1.25},
    ),
    (
        "longrope below the original length",
        {"scaling": {"longrope": {**LISTS, "factor": 32.0, "original_length": 4096}}},
        1e4, 16, 4096, "longrope", {**LONGROPE, "factor": 32.0, "original": 4096},
    ),
    (
        "longrope above the original length",
        {"scaling": {"longrope": {**LISTS, "attention_factor": 1.2, "original_length": 4096}}},
        1e4, 16, 4097, "longrope", {**LONGROPE, "attention_factor": 1.2, "original": 4096},
    ),
]


def deepseek_softmax_factor(theta, parameters):
    """Returns the factor of DeepSeek-V3's attention on the usual scale of its softmax."""
    config = DeepseekV3Config(
        hidden_size=64, num_attention_heads=2, rope_parameters=parameters
    )
    attention = DeepseekV3Attention(config, layer_idx=0)
    return attention.scaling * attention.qk_head_dim**0.5


def case(name, rope, theta, head_dim, length, kind, parameters):
    parameters = dict(parameters)
    original = parameters.pop("original", 2048)
    parameters |= {
        "rope_type": "dynamic" if kind == "ntk_alpha" else kind,
        "rope_theta": theta,
        "partial_rotary_factor": rope.get("fraction", 1.0),
    }
    if kind in ("llama3", "yarn", "longrope"):
        parameters["original_max_position_embeddings"] = original
    shape = dict(head_dim=head_dim, max_position_embeddings=original, rope_parameters=parameters)
    if kind == "ntk_alpha":
        config = HunYuanMoEV1Config(**shape)
        embedding = HunYuanMoEV1RotaryEmbedding
        radians, factor = embedding.compute_ntk_alpha_rope_parameters(config)
    elif kind == "default":
        # Llama itself rotates whole heads.
        shape["head_dim"] = round(head_dim * parameters["partial_rotary_factor"])
        radians, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(LlamaConfig(**shape))
    else:
        radians, factor = ROPE_INIT_FUNCTIONS[kind](LlamaConfig(**shape), None, seq_len=length)
    out = dict(name=name, rope=rope, theta=theta, head_dim=head_dim, length=length)
    out |= {"radians": radians.tolist(), "attention_factor": float(factor)}
    if "mscale_all_dim" in parameters:
        out["softmax_scale_factor"] = deepseek_softmax_factor(theta, parameters)
    return out


folder = Path(__file__).parents[2] / "trainer/tests/golden"
output = Path(sys.argv[1]) if len(sys.argv) > 1 else folder / "rope.json"
lines = ",\n".join(json.dumps(case(*values)) for values in CASES)
output.write_text(f"[\n{lines}\n]\n")
