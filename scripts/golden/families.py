#!/usr/bin/env python3
"""Writes golden folders: tiny Hugging Face models of each family, and what they compute.

usage: scripts/golden/families.py [--output DIR] [NAME ...]
                                   (default: trainer/tests/golden/families, all)

To add a folder, add an entry to FAMILIES: a configuration of transformers, and what its folder has
that save_pretrained does not write. folders.py lists the files of a folder and checks them: choices
of experts are not close, frozen biases and groups change them, transformers loads the folder again
with the same logits, and a folder is below 170 KB. The folder itself is the fixture: moerun's tests
read it with the importer.

Sizes are small and uneven, so that a mistake shows: heads are together wider than the model, key
and value heads are fewer, and some models have more than 10 experts, whose order as text differs
from their order as numbers.
Made with torch 2.11.0 and transformers 5.23.0.
"""

import argparse
import shutil
from pathlib import Path

import torch
from folders import Family, loaded, read, write_family
from tokenizer import write_tokenizer
from transformers import (
    GraniteMoeConfig,
    GraniteMoeSharedConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

SMALL = dict(
    vocab_size=48,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    # torch's embedding gives a padding token no gradient.
    pad_token_id=None,
    bos_token_id=0,
    eos_token_id=0,
)
# Factors of granite, none of which is 1.
MULTIPLIERS = dict(
    embedding_multiplier=12.0,
    residual_multiplier=0.22,
    attention_multiplier=0.3,
    logits_scaling=6.0,
)


def rope(theta, **more):
    """Returns parameters of rotary embedding in the spelling of transformers 5."""
    return {"rope_type": "default", "rope_theta": theta, **more}


def finish_qwen3(folder):
    """Adds a tokenizer, and a folder with the same weights whose experts are stacked."""
    fused = folder.parents[1] / "qwen3_moe-fused/model"
    shutil.rmtree(fused, ignore_errors=True)
    loaded(folder).save_pretrained(fused, save_original_format=False)
    (fused / "model.safetensors").chmod(0o644)
    split, stacked = read(folder), read(fused)
    for layer in range(2):
        for name, parts in (("gate_up", ("gate", "up")), ("down", ("down",))):
            prefix = f"model.layers.{layer}.mlp.experts"
            for expert, matrix in enumerate(stacked[f"{prefix}.{name}_proj"]):
                rows = [split[f"{prefix}.{expert}.{part}_proj.weight"] for part in parts]
                assert torch.equal(matrix, torch.cat(rows))
    write_tokenizer(folder)


FAMILIES = {
    # Sharded, with a tokenizer, and also written with stacked experts as `qwen3_moe-fused`.
    "qwen3_moe": Family(
        Qwen3MoeConfig(
            **SMALL,
            head_dim=8,
            moe_intermediate_size=4,
            intermediate_size=20,
            num_experts=11,
            num_experts_per_tok=3,
            norm_topk_prob=True,
            rope_parameters=rope(12345.0),
        ),
        shard=12_000,
        finish=finish_qwen3,
    ),
    # Weights of experts do not sum to 1, and a dense layer lies between MoE layers.
    "qwen3_moe-tied": Family(
        Qwen3MoeConfig(
            **{**SMALL, "tie_word_embeddings": True, "num_hidden_layers": 3},
            head_dim=8,
            moe_intermediate_size=8,
            intermediate_size=12,
            num_experts=4,
            num_experts_per_tok=2,
            norm_topk_prob=False,
            mlp_only_layers=[1],
            rope_parameters=rope(1e6),
        ),
    ),
    "mixtral": Family(
        MixtralConfig(
            **SMALL,
            head_dim=8,
            intermediate_size=12,
            num_local_experts=4,
            num_experts_per_tok=2,
            rope_parameters=rope(1e6),
        ),
    ),
    # As released, config.json has no head_dim.
    "olmoe": Family(
        OlmoeConfig(
            **SMALL,
            intermediate_size=4,
            num_experts=11,
            num_experts_per_tok=3,
            norm_topk_prob=False,
            rope_parameters=rope(1e4),
        ),
    ),
    "granitemoe": Family(
        GraniteMoeConfig(
            **{**SMALL, "tie_word_embeddings": True},
            **MULTIPLIERS,
            intermediate_size=8,
            num_local_experts=6,
            num_experts_per_tok=2,
            rope_parameters=rope(1e4),
        ),
    ),
    "granitemoeshared": Family(
        GraniteMoeSharedConfig(
            **{**SMALL, "tie_word_embeddings": True},
            **MULTIPLIERS,
            head_dim=8,
            intermediate_size=8,
            shared_intermediate_size=6,
            num_local_experts=6,
            num_experts_per_tok=2,
            rope_parameters=rope(1e4),
        ),
    ),
    "llama": Family(
        LlamaConfig(
            **{**SMALL, "max_position_embeddings": 512},
            head_dim=12,
            intermediate_size=20,
            # Of 6 frequencies, one stays, one lies between, and four are scaled.
            rope_parameters=rope(
                5e5,
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=64,
            ),
        ),
    ),
    "qwen3": Family(
        Qwen3Config(
            **{**SMALL, "tie_word_embeddings": True},
            head_dim=12,
            intermediate_size=20,
            rope_parameters=rope(1e6),
        ),
    ),
}


def main():
    parser = argparse.ArgumentParser(description="Writes golden folders.")
    folder = Path(__file__).parents[2] / "trainer/tests/golden/families"
    parser.add_argument("--output", type=Path, default=folder, help="folder of the folders")
    parser.add_argument("names", nargs="*", default=list(FAMILIES), metavar="NAME")
    arguments = parser.parse_args()
    for name in arguments.names:
        write_family(name, FAMILIES[name], arguments.output)


main()
