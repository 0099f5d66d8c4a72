#!/usr/bin/env python3
"""Writes golden folders: tiny Hugging Face models of each family, and what they compute.

usage: scripts/golden/families.py [--output DIR] [NAME ...]
                                   (default: trainer/tests/golden/families, all)

To add a folder, add an entry to FAMILIES: a configuration of transformers, and what its folder has
that save_pretrained does not write. latent.py has families with latent attention. The folder itself
is the fixture: moerun's tests read it with the importer.

folders.py lists the files of a folder and checks them. Choices of experts are not close. Frozen
biases and groups change them. Rounding does not decide a weight after training. transformers loads
the folder again with the same logits. A folder is below 170 KB.

Sizes are small and uneven, so that a mistake shows: heads are together wider than the model, key
and value heads are fewer, and some models have more than 10 experts, whose order as text differs
from their order as numbers.
Made with torch 2.11.0 and transformers 5.23.0.
"""

import argparse
import shutil
from pathlib import Path

import latent
import torch
from folders import Family, loaded, read, write, write_family
from quantized import MXFP4_CONFIG, mxfp4, mxfp4_extremes
from released import old_spelling, release_bailing, release_bailing_config
from shapes import SMALL, draw_choice_biases, near_seven, rope
from tokenizer import write_tokenizer
from transformers import (
    AfmoeConfig,
    Dots1Config,
    Ernie4_5_MoeConfig,
    FlexOlmoConfig,
    Glm4MoeConfig,
    GptOssConfig,
    GraniteMoeConfig,
    GraniteMoeSharedConfig,
    HunYuanMoEV1Config,
    LlamaConfig,
    MiniMaxM2Config,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

# Factors of granite, none of which is 1.
MULTIPLIERS = dict(
    embedding_multiplier=12.0,
    residual_multiplier=0.22,
    attention_multiplier=0.3,
    logits_scaling=6.0,
)


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


def gpt_oss(**more):
    """Returns a configuration of gpt_oss."""
    values = dict(
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=4,
        rope_parameters=rope(
            15e4,
            rope_type="yarn",
            factor=8.0,
            original_max_position_embeddings=8,
            beta_fast=32.0,
            beta_slow=1.0,
            truncate=False,
        ),
    )
    return GptOssConfig(**{**SMALL, **values, **more})


def olmo3(sliding, full):
    """Returns a configuration of olmo3 with the rotary embedding of each kind of layer."""
    return Olmo3Config(
        **{**SMALL, "num_hidden_layers": 4},
        intermediate_size=12,
        sliding_window=4,
        rope_parameters={"sliding_attention": sliding, "full_attention": full},
    )


def reach_the_limits(module):
    """Draws wide sinks, and experts whose values reach the limit of the clamped GLU."""
    for name, parameter in module.named_parameters():
        if name.endswith("sinks"):
            parameter.uniform_(-3, 3)
        elif name.endswith("experts.gate_up_proj"):
            parameter.mul_(4)


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
        seed=2,
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
    "glm4_moe": Family(
        glm4_moe(attention_bias=True),
        shard=16_000,
        adjust=near_seven,
        seed=1,
    ),
    # Without norms, the bias of key elements that do not rotate adds the same to all scores.
    "glm4_moe-air": Family(
        glm4_moe(use_qk_norm=False, attention_bias=True, head_dim=8, routed_scaling_factor=1.0),
        adjust=draw_choice_biases,
        undetermined=("self_attn.k_proj.bias",),
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
        adjust=lambda module: draw_choice_biases(module, std=0.03),
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
    # Matrices of experts are transposed. Those of `down` are square, which hides it.
    "gpt_oss": Family(gpt_oss(intermediate_size=16), adjust=reach_the_limits),
    # Those of gate and up are square.
    "gpt_oss-square": Family(gpt_oss(intermediate_size=8), adjust=reach_the_limits),
    # One layer, as rows are at least as long as a block of mxfp4.
    "gpt_oss-mxfp4": Family(
        gpt_oss(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=3,
        ),
        adjust=reach_the_limits,
        quantize=mxfp4,
        release_config=old_spelling(
            kind="rope_type",
            experts_per_token=2,
            initial_context_length=8,
            quantization_config=MXFP4_CONFIG,
        ),
        reload=dict(quantization_config={**MXFP4_CONFIG, "dequantize": True}),
        finish=lambda folder: write(folder.parent / "scales.safetensors", mxfp4_extremes()),
    ),
    **latent.FAMILIES,
    # Three of four layers slide and rotate, outputs of heads are gated, four norms a layer.
    "afmoe": Family(
        AfmoeConfig(
            **{
                **SMALL,
                "num_hidden_layers": 4,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
            },
            head_dim=10,
            intermediate_size=12,
            moe_intermediate_size=4,
            num_dense_layers=2,
            num_experts=4,
            num_experts_per_tok=2,
            num_shared_experts=1,
            route_scale=2.5,
            global_attn_every_n_layers=4,
            sliding_window=4,
            mup_enabled=True,
            # Keys of the release that other programs read, and transformers does not.
            n_group=1,
            topk_group=1,
            route_norm=True,
            score_func="sigmoid",
            rope_parameters=rope(1e4),
        ),
        adjust=draw_choice_biases,
    ),
    # Norms after the blocks and none before.
    "flex_olmo": Family(
        FlexOlmoConfig(
            **SMALL,
            intermediate_size=8,
            num_experts=6,
            num_experts_per_tok=2,
            rope_parameters=rope(5e5),
        ),
    ),
    "olmo2": Family(Olmo2Config(**SMALL, intermediate_size=20, rope_parameters=rope(5e5))),
    # Three of four layers slide.
    "olmo3-same": Family(olmo3(rope(1e4), rope(1e4))),
    # Three of four layers slide, and YaRN is for the others alone.
    "olmo3": Family(
        olmo3(
            rope(5e5),
            rope(
                5e5,
                rope_type="yarn",
                factor=8.0,
                original_max_position_embeddings=8,
                beta_fast=32.0,
                beta_slow=1.0,
                attention_factor=1.2,
            ),
        )
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
