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
from folders import CHOICE_BIAS, Family, loaded, read, write_family
from released import old_spelling, release_bailing, release_bailing_config
from tokenizer import write_tokenizer
from transformers import (
    Dots1Config,
    Ernie4_5_MoeConfig,
    Glm4MoeConfig,
    GraniteMoeConfig,
    GraniteMoeSharedConfig,
    HunYuanMoEV1Config,
    LlamaConfig,
    MiniMaxM2Config,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
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


def state(module):
    """Returns parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def near_seven(module):
    """Sets choice biases as GLM has them. Rounded to bf16, all of them would be 7.

    Routers are weak, so that these biases decide.
    """
    for name, tensor in state(module).items():
        if name.endswith(CHOICE_BIAS):
            tensor.copy_(7 + 1e-3 * torch.arange(tensor.numel()).reshape(tensor.shape))
        elif name.endswith("mlp.gate.weight"):
            tensor.mul_(0.1)


def draw_choice_biases(module):
    """Draws choice biases."""
    for name, bias in state(module).items():
        if name.endswith(CHOICE_BIAS):
            torch.nn.init.normal_(bias, std=0.1)


def glm4_moe(**more):
    """Returns a configuration of glm4_moe, also for families that compute the same."""
    values = dict(
        num_key_value_heads=2,
        head_dim=12,
        attention_bias=False,
        use_qk_norm=True,
        n_routed_experts=6,
        num_experts_per_tok=2,
        n_shared_experts=1,
        moe_intermediate_size=8,
        intermediate_size=20,
        first_k_dense_replace=1,
        routed_scaling_factor=2.5,
        num_mtp_layers=0,
        rope_parameters=rope(1e6, partial_rotary_factor=0.5),
    )
    return Glm4MoeConfig(**{**SMALL, **values, **more})


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
    # A part of a head rotates, and that part has an odd number of pairs.
    "glm4_moe": Family(glm4_moe(attention_bias=True), shard=16_000, adjust=near_seven),
    "glm4_moe-air": Family(
        glm4_moe(use_qk_norm=False, attention_bias=True, head_dim=8, routed_scaling_factor=1.0),
        adjust=draw_choice_biases,
    ),
    # Of 12 elements of a head 6 rotate, which config.json says as it was released.
    "minimax_m2": Family(
        MiniMaxM2Config(
            **SMALL,
            head_dim=12,
            intermediate_size=4,
            num_local_experts=6,
            num_experts_per_tok=2,
            rope_parameters=rope(5e6, partial_rotary_factor=0.5),
        ),
        adjust=near_seven,
        release_config=old_spelling(
            rotary_dim=6,
            partial_rotary_factor="absent",
            mtp_transformer_layers=1,
            num_mtp_modules=3,
            scoring_func="sigmoid",
            shared_intermediate_size=0,
            use_mtp=True,
            use_qk_norm=True,
            use_routing_bias=True,
        ),
    ),
    # transformers has no class for it: renamed from glm4_moe.
    "bailing_moe_v2": Family(
        glm4_moe(
            n_routed_experts=8,
            n_group=4,
            topk_group=2,
            num_experts_per_tok=3,
            rope_parameters=rope(6e5, partial_rotary_factor=0.5),
        ),
        adjust=draw_choice_biases,
        release=release_bailing,
        release_config=release_bailing_config,
        reload=None,
    ),
    # As released, config.json has null for the number of groups.
    "dots1": Family(
        Dots1Config(
            **SMALL,
            head_dim=8,
            n_routed_experts=6,
            num_experts_per_tok=2,
            n_shared_experts=2,
            moe_intermediate_size=4,
            intermediate_size=20,
            first_k_dense_replace=1,
            routed_scaling_factor=2.5,
            norm_topk_prob=True,
            rope_parameters=rope(1e7),
        ),
        adjust=draw_choice_biases,
        release_config=old_spelling(n_group=None, topk_group=None),
        reload=dict(n_group=1, topk_group=1),
    ),
    "qwen2_moe": Family(
        Qwen2MoeConfig(
            **{**SMALL, "num_hidden_layers": 3},
            moe_intermediate_size=4,
            shared_expert_intermediate_size=10,
            intermediate_size=20,
            num_experts=6,
            num_experts_per_tok=2,
            norm_topk_prob=False,
            mlp_only_layers=[1],
            rope_parameters=rope(1e6),
        ),
    ),
    # Neighboring elements rotate together, and choice biases have two dimensions.
    "ernie4_5_moe": Family(
        Ernie4_5_MoeConfig(
            **{**SMALL, "tie_word_embeddings": True, "num_hidden_layers": 3},
            head_dim=8,
            intermediate_size=12,
            moe_intermediate_size=4,
            moe_num_experts=6,
            moe_k=2,
            moe_num_shared_experts=2,
            moe_layer_start_index=1,
            rope_parameters=rope(5e5),
        ),
        adjust=draw_choice_biases,
    ),
    # Norms of queries and keys come after rotation. As released, config.json has lists by layer.
    "hunyuan_v1_moe": Family(
        HunYuanMoEV1Config(
            **{**SMALL, "tie_word_embeddings": True},
            head_dim=8,
            intermediate_size=8,
            num_experts=6,
            moe_topk=2,
            rope_parameters=rope(1e4, rope_type="dynamic", alpha=1000.0, factor=1.0),
        ),
        release_config=old_spelling(
            attention_head_dim=8,
            moe_intermediate_size=[8, 8],
            moe_topk=[2, 2],
            num_shared_expert=[1, 1],
            use_mixed_mlp_moe=True,
            use_qk_norm=True,
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
