#!/usr/bin/env python3
"""Writes golden files: outputs, losses and gradients of tiny Hugging Face transformers models.

usage: scripts/golden/models.py [--output DIR] [NAME ...]   (default: trainer/tests/golden/models,
                                                            all)

To add a model, add an entry to MODELS: the class and configuration of transformers, or any
torch module whose output has `loss` and `logits`, and moerun's section `model` for the same
function. If a parameter has a new name, map it in NAMES, or in the entry if families differ.
trainer/tests/golden.rs tests every file in the folder. A file is below 150 KB: choose small sizes.

One safetensors file per model, with moerun's parameter names, so that the tests need no Python:
  weight/NAME, grad/NAME   every parameter and its gradient of the total loss
  after/NAME               the parameter after 3 steps of clip_grad_norm_(1.0) and AdamW, same batch
  bias/NAME                balancing biases without gradients, unless they are zero
  input_ids, logits, loss, total_loss, grad_norm
  aux_loss                 only of models with a load-balancing loss
  labels                   only of masked entries: -100 at some positions, and in all of sequence 1
The metadata has moerun's section `model` as JSON, and the tolerance of gradients. Entries whose
sequences have several documents take no optimizer steps; their metadata has the rules of documents
as JSON: the token `end`, and whether they `mask` and `reset_positions`.
Made with torch 2.11.0 and transformers 5.23.0.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    AfmoeConfig,
    AfmoeForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    FlexOlmoConfig,
    FlexOlmoForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    HunYuanMoEV1Config,
    HunYuanMoEV1ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)


@dataclass
class Documents:
    """Rules for documents that share a sequence."""

    # Tokens attend only within their document.
    mask: bool
    # Positions begin at 0 in each document.
    reset_positions: bool
    # The token that ends a document.
    end: int = 7

    def ids(self, ids):
        """Returns the ids with more ends of documents, two of them one after the other."""
        ids = ids.masked_fill(torch.rand(ids.shape) < 0.15, self.end)
        ids[0, 5:7] = self.end
        return ids

    def numbers(self, ids):
        """Returns the number of each token's document in its sequence."""
        ends = (ids == self.end).long()
        return ends.cumsum(1) - ends

    def inputs(self, ids, config):
        """Returns what the model of transformers takes to treat documents so."""
        length = ids.shape[1]
        distance = torch.arange(length)[:, None] - torch.arange(length)[None]
        visible = (distance >= 0).expand(len(ids), length, length)
        numbers = self.numbers(ids)
        is_same = numbers[:, :, None] == numbers[:, None]
        if self.mask:
            visible = visible & is_same
        masks = {"full_attention": visible}
        if getattr(config, "sliding_window", None) is not None:
            masks["sliding_attention"] = visible & (distance < config.sliding_window)
        lowest = torch.finfo(torch.float32).min
        masks = {n: torch.where(m, 0.0, lowest).unsqueeze(1) for n, m in masks.items()}
        position_ids = torch.arange(length).expand(len(ids), length)
        if self.reset_positions:
            # The tokens of a document before each one.
            position_ids = (is_same & (distance > 0)).sum(2)
        by_layer = getattr(config, "layer_types", None) is not None
        return {
            "position_ids": position_ids,
            "attention_mask": masks if by_layer else masks["full_attention"],
        }


@dataclass
class Golden:
    """A model twice: in torch, and as moerun's section `model`."""

    model_class: type
    config: object
    model: dict
    # Names within a layer that only this family gives this meaning; they take precedence.
    names: dict = field(default_factory=dict)
    # True to train with labels of -100.
    masked: bool = False
    # Rules for documents, if sequences have several.
    documents: Documents | None = None
    # Largest difference of a gradient, relative to its largest value.
    tolerance: float = 1e-4
    # Range of vectors. Norms start as ones, which would hide a missing weight.
    vectors: tuple = (0.5, 1.5)
    # Changes the drawn parameters of the module, in place.
    adjust: Callable = lambda module: None
    # Reorders the rows of a parameter, or of its gradient, by its name within a layer.
    reorder: Callable = lambda name, tensor: tensor


SHAPE = dict(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    output_router_logits=True,
    router_aux_loss_coef=0.01,
    tie_word_embeddings=False,
    use_cache=False,
)
OURS = dict(vocab_size=96, hidden=32, layers=2, heads=4)
# Sizes for new models. Heads are together wider than the model.
SMALL = dict(
    vocab_size=48,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    output_router_logits=True,
    router_aux_loss_coef=0.01,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    use_cache=False,
    # torch's embedding gives a padding token no gradient.
    pad_token_id=None,
    bos_token_id=0,
    eos_token_id=0,
)
SMALL_OURS = dict(vocab_size=48, hidden=16, layers=2, heads=4, kv_heads=2, head_dim=8)


def moe(experts, top_k, ffn, **more):
    """Returns a section `model.moe` with the load-balancing loss of transformers at 0.01."""
    return dict(
        experts=experts,
        top_k=top_k,
        ffn=ffn,
        # The loss of transformers is top_k times ours, taken once over all layers.
        load_balance=0.01 * top_k,
        load_balance_over="microbatch",
        load_balance_pool_layers=True,
        **more,
    )


def mixtral(rope_parameters, rope):
    """Returns a small Mixtral with these properties of rotary embedding."""
    config = MixtralConfig(
        **SMALL,
        intermediate_size=12,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_theta": 1e4, **rope_parameters},
    )
    return Golden(MixtralForCausalLM, config, {**SMALL_OURS, "moe": moe(4, 2, 12), "rope": rope})


def latent_rows(heads, nope, rope):
    """Returns how rows of DeepSeek's latent attention become those of moerun.

    DeepSeek rotates neighboring elements, moerun element i with i + rope / 2; and moerun has the
    elements that rotate first. Scores are the same, as queries and keys are reordered alike.
    """
    halves = torch.cat([torch.arange(0, rope, 2), torch.arange(1, rope, 2)])

    def reorder(name, tensor):
        if name in ("self_attn.q_proj.weight", "self_attn.q_b_proj.weight"):
            by_head = tensor.view(heads, nope + rope, -1)
            rotating = by_head[:, nope:][:, halves]
            return torch.cat([rotating, by_head[:, :nope]], dim=1).flatten(0, 1)
        if name == "self_attn.kv_a_proj_with_mqa.weight":
            rank = tensor.shape[0] - rope
            return torch.cat([tensor[:rank], tensor[rank:][halves]])
        return tensor

    return reorder


def set_correction_biases(module):
    """Sets biases that change the choice of experts but not their weights."""
    for name, bias in [*module.named_parameters(), *module.named_buffers()]:
        if name.endswith("e_score_correction_bias") or name.endswith("expert_bias"):
            bias.copy_(0.3 * torch.randn(bias.shape))


def expert_matrices(name, tensor):
    """Returns gpt-oss's stacks `[E, in, out]` as `[E, out, in]`, gate before up."""
    if name.endswith("_proj"):
        tensor = tensor.transpose(1, 2)
    if "gate_up" in name:
        tensor = torch.cat([tensor[:, 0::2], tensor[:, 1::2]], dim=1)
    return tensor


def reach_the_limits(module):
    """Draws wide sinks, and experts whose values reach the limit of the clamped GLU."""
    for name, parameter in module.named_parameters():
        if name.endswith("sinks"):
            parameter.uniform_(-3, 3)
        elif "experts.gate_up_proj" in name:
            parameter.mul_(20)
        elif name.endswith("bias"):
            parameter.sub_(1)


# Sizes of models with latent attention.
LATENT = dict(
    vocab_size=48,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=64,
    intermediate_size=20,
    moe_intermediate_size=8,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    kv_lora_rank=12,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=10,
    # The norms of latents keep their own term.
    rms_norm_eps=1e-3,
    use_cache=False,
    pad_token_id=None,
)
LATENT_OURS = dict(
    vocab_size=48, hidden=16, layers=2, heads=4, ffn=20, dense_layers=1, norm_eps=1e-3
)
LONGROPE = {"short": [1.0, 1.5, 2.0, 2.5], "long": [1.5, 3.0, 6.0, 12.0]}
# Families in which a norm after attention has the name that others use for the one before the
# feed-forward block.
OUTPUT_NORMS = {
    "post_attention_layernorm.weight": "attention_post_norm",
    "pre_feedforward_layernorm.weight": "feed_forward_norm",
    "post_feedforward_layernorm.weight": "feed_forward_post_norm",
}
MODELS = {
    "mixtral": Golden(
        MixtralForCausalLM,
        MixtralConfig(
            **SHAPE,
            num_key_value_heads=2,
            intermediate_size=48,
            num_local_experts=4,
            num_experts_per_tok=2,
            rms_norm_eps=1e-5,
        ),
        {**OURS, "kv_heads": 2, "rope_theta": 1e6, "moe": moe(4, 2, 48)},
    ),
    "olmoe": Golden(
        OlmoeForCausalLM,
        OlmoeConfig(
            **SHAPE,
            num_key_value_heads=4,
            intermediate_size=24,
            num_experts=8,
            num_experts_per_tok=3,
            norm_topk_prob=False,
            rms_norm_eps=1e-5,
            pad_token_id=0,
            eos_token_id=0,
        ),
        {**OURS, "qk_norm": "full", "moe": moe(8, 3, 24, router={"normalize": False})},
    ),
    "granite": Golden(
        GraniteMoeForCausalLM,
        GraniteMoeConfig(
            **{**SHAPE, "tie_word_embeddings": True},
            num_key_value_heads=2,
            intermediate_size=24,
            num_local_experts=6,
            num_experts_per_tok=2,
            rms_norm_eps=1e-5,
            embedding_multiplier=12.0,
            residual_multiplier=0.22,
            attention_multiplier=1 / 8,
            logits_scaling=2.0,
        ),
        {
            **OURS,
            "kv_heads": 2,
            "tie_embeddings": True,
            "mup": {"width": 2.0, "embedding": 12.0, "residual": 0.22},
            "moe": moe(6, 2, 24),
        },
    ),
    # Part of a head rotates, and a part of odd halves.
    "glm4-moe": Golden(
        Glm4MoeForCausalLM,
        Glm4MoeConfig(
            **{**SMALL, "head_dim": 12},
            attention_bias=False,
            use_qk_norm=True,
            n_routed_experts=6,
            num_experts_per_tok=2,
            n_shared_experts=1,
            moe_intermediate_size=8,
            intermediate_size=20,
            first_k_dense_replace=1,
            routed_scaling_factor=2.5,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e6,
                "partial_rotary_factor": 0.5,
            },
        ),
        {
            **SMALL_OURS,
            "head_dim": 12,
            "ffn": 20,
            "dense_layers": 1,
            "qk_norm": "head",
            "rope_theta": 1e6,
            "rope": {"fraction": 0.5},
            "moe": {
                "experts": 6,
                "top_k": 2,
                "ffn": 8,
                "shared_experts": 1,
                "load_balance": 0.0,
                "router": {"score": "sigmoid", "scale": 2.5},
            },
        },
    ),
    # As gpt-oss, whose transition between frequencies is not rounded.
    "yarn": mixtral(
        {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 8,
            "truncate": False,
        },
        {"scaling": {"yarn": {"factor": 8.0, "original_length": 8, "truncate": False}}},
    ),
    # The sequences are longer than those of pretraining.
    "longrope": mixtral(
        {
            "rope_type": "longrope",
            "short_factor": LONGROPE["short"],
            "long_factor": LONGROPE["long"],
            "factor": 8.0,
            "original_max_position_embeddings": 8,
        },
        {"scaling": {"longrope": {**LONGROPE, "factor": 8.0, "original_length": 8}}},
    ),
    # One of the layers has no positions.
    "smollm3": Golden(
        SmolLM3ForCausalLM,
        SmolLM3Config(**SMALL, intermediate_size=24, no_rope_layers=[1, 0]),
        {**SMALL_OURS, "ffn": 24, "rope_theta": 2e6, "rope": {"layers": [0]}},
    ),
    "hunyuan": Golden(
        HunYuanMoEV1ForCausalLM,
        HunYuanMoEV1Config(
            **SMALL,
            intermediate_size=12,
            num_experts=4,
            moe_topk=2,
            rope_parameters={
                "rope_type": "dynamic",
                "rope_theta": 1e4,
                "alpha": 100.0,
                "factor": 1.0,
            },
        ),
        {
            **SMALL_OURS,
            "qk_norm": "head_after_rope",
            "rope": {"scaling": {"ntk_alpha": {"alpha": 100.0}}},
            "moe": {"experts": 4, "top_k": 2, "ffn": 12, "shared_experts": 1, "load_balance": 0.0},
        },
    ),
    # Multipliers without the rest of maximal update parametrization.
    "granite-multipliers": Golden(
        GraniteMoeForCausalLM,
        GraniteMoeConfig(
            **{**SMALL, "tie_word_embeddings": True, "head_dim": 4},
            intermediate_size=12,
            num_local_experts=6,
            num_experts_per_tok=2,
            embedding_multiplier=12.0,
            residual_multiplier=0.22,
            attention_multiplier=0.3,
            logits_scaling=6.0,
        ),
        {
            **SMALL_OURS,
            "head_dim": 4,
            "tie_embeddings": True,
            "multipliers": {
                "embedding": 12.0,
                "residual": 0.22,
                "attention": 0.3,
                "logits": 1 / 6,
            },
            "moe": moe(6, 2, 12),
        },
    ),
    # Norms after the blocks, as in OLMo 2.
    "flex-olmo": Golden(
        FlexOlmoForCausalLM,
        FlexOlmoConfig(
            **SMALL,
            intermediate_size=12,
            num_experts=4,
            num_experts_per_tok=2,
            rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        ),
        {
            **SMALL_OURS,
            "qk_norm": "full",
            "rope_theta": 5e5,
            "norm": {"placement": "post"},
            "moe": moe(4, 2, 12, router={"normalize": False}),
        },
        names=OUTPUT_NORMS,
    ),
    # Norms before and after the blocks, and weights stored minus one, which also start near zero.
    "gemma3": Golden(
        Gemma3ForCausalLM,
        Gemma3TextConfig(
            **{**SMALL, "tie_word_embeddings": True},
            intermediate_size=24,
            hidden_activation="silu",
            query_pre_attn_scalar=5,
            layer_types=["full_attention"] * 2,
            rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
        ),
        {
            **SMALL_OURS,
            "ffn": 24,
            "qk_norm": "head",
            "norm": {"placement": "sandwich", "zero_centered": True},
            "multipliers": {"embedding": 4.0, "attention": 5**-0.5},
            "tie_embeddings": True,
        },
        names=OUTPUT_NORMS,
        vectors=(-0.2, 0.3),
    ),
    # A dense layer between MoE layers.
    "qwen3-moe": Golden(
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(
            **{
                **SMALL,
                "num_hidden_layers": 4,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "tie_word_embeddings": True,
            },
            moe_intermediate_size=8,
            intermediate_size=12,
            num_experts=4,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            mlp_only_layers=[2],
        ),
        {
            **SMALL_OURS,
            "layers": 4,
            "heads": 2,
            "kv_heads": 1,
            "qk_norm": "head",
            "ffn": 12,
            "tie_embeddings": True,
            "moe": moe(4, 2, 8, layers=[0, 1, 3]),
        },
    ),
    # Sinks, a window in every other layer, biases everywhere, and the clamped GLU.
    "gpt-oss": Golden(
        GptOssForCausalLM,
        GptOssConfig(
            **SMALL,
            intermediate_size=12,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=4,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 15e4,
                "factor": 8.0,
                "original_max_position_embeddings": 8,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
            },
        ),
        {
            **SMALL_OURS,
            "rope_theta": 15e4,
            "rope": {
                "scaling": {"yarn": {"factor": 8.0, "original_length": 8, "truncate": False}}
            },
            "attention": {
                "grouped": {
                    "window": {"size": 4, "layers": {"every": 2}},
                    "sinks": True,
                    "bias": "all",
                }
            },
            "moe": moe(
                4,
                2,
                12,
                expert_bias=True,
                activation={"clamped_glu": {}},
                router={"bias": "trained"},
            ),
        },
        adjust=reach_the_limits,
        reorder=expert_matrices,
    ),
    # Every layer slides.
    "mixtral-window": Golden(
        MixtralForCausalLM,
        MixtralConfig(
            **SMALL,
            intermediate_size=12,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=5,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        ),
        {
            **SMALL_OURS,
            "moe": moe(4, 2, 12),
            "attention": {"grouped": {"window": {"size": 5}}},
        },
    ),
    # Three of four layers slide and rotate, outputs of heads are gated, four norms a layer.
    "afmoe": Golden(
        AfmoeForCausalLM,
        AfmoeConfig(
            **{**SMALL, "num_hidden_layers": 4, "tie_word_embeddings": True},
            intermediate_size=10,
            moe_intermediate_size=4,
            num_dense_layers=3,
            num_experts=4,
            num_experts_per_tok=2,
            num_shared_experts=1,
            route_scale=2.5,
            global_attn_every_n_layers=4,
            sliding_window=4,
            mup_enabled=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        ),
        {
            **SMALL_OURS,
            "layers": 4,
            "dense_layers": 3,
            "ffn": 10,
            "tie_embeddings": True,
            "qk_norm": "head",
            "norm": {"placement": "sandwich"},
            "rope": {"layers": {"all_but": {"every": 4, "from": 3}}},
            "attention": {
                "grouped": {
                    "window": {"size": 4, "layers": {"all_but": {"every": 4, "from": 3}}},
                    "output_gate": True,
                }
            },
            "multipliers": {"embedding": 4.0},
            "moe": {
                "experts": 4,
                "top_k": 2,
                "ffn": 4,
                "shared_experts": 1,
                "load_balance": 0.0,
                "router": {"score": "sigmoid", "scale": 2.5, "bias": "frozen"},
            },
        },
        names={
            "post_attention_layernorm.weight": "attention_post_norm",
            "pre_mlp_layernorm.weight": "feed_forward_norm",
            "post_mlp_layernorm.weight": "feed_forward_post_norm",
            "self_attn.gate_proj.weight": "attention.gate",
            "mlp.router.gate.weight": "moe.gate",
            "mlp.expert_bias": "moe.bias",
        },
        adjust=set_correction_biases,
    ),
    # Latent attention with a latent of queries, and YaRN, which also scales the softmax.
    "deepseek-v3": Golden(
        DeepseekV3ForCausalLM,
        DeepseekV3Config(
            **LATENT,
            q_lora_rank=14,
            n_routed_experts=8,
            n_shared_experts=1,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=2.5,
            norm_topk_prob=True,
            num_mtp_layers=0,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 8.0,
                "original_max_position_embeddings": 8,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 0.7,
                "mscale_all_dim": 0.9,
            },
        ),
        {
            **LATENT_OURS,
            "attention": {
                "latent": {
                    "query_rank": 14,
                    "kv_rank": 12,
                    "nope_dim": 6,
                    "rope_dim": 4,
                    "value_dim": 10,
                }
            },
            "rope": {
                "scaling": {
                    "yarn": {
                        "factor": 8.0,
                        "original_length": 8,
                        "mscale": 0.7,
                        "mscale_all_dim": 0.9,
                    }
                }
            },
            "moe": {
                "experts": 8,
                "top_k": 2,
                "ffn": 8,
                "shared_experts": 1,
                "load_balance": 0.0,
                "router": {
                    "score": "sigmoid",
                    "scale": 2.5,
                    "groups": 4,
                    "top_groups": 2,
                    "bias": "frozen",
                },
            },
        },
        adjust=set_correction_biases,
        reorder=latent_rows(4, 6, 4),
    ),
    # Latent attention whose queries come from the residual stream.
    "deepseek-v2": Golden(
        DeepseekV2ForCausalLM,
        DeepseekV2Config(
            **LATENT,
            q_lora_rank=None,
            n_routed_experts=6,
            n_shared_experts=2,
            topk_method="greedy",
            routed_scaling_factor=1.5,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        ),
        {
            **LATENT_OURS,
            "attention": {
                "latent": {"kv_rank": 12, "nope_dim": 6, "rope_dim": 4, "value_dim": 10}
            },
            "moe": {
                "experts": 6,
                "top_k": 2,
                "ffn": 8,
                "shared_experts": 2,
                "load_balance": 0.0,
                "router": {"normalize": False, "scale": 1.5},
            },
        },
        reorder=latent_rows(4, 6, 4),
    ),
}
# Biases of queries, keys and values.
MODELS["glm4-moe-bias"] = replace(
    MODELS["glm4-moe"],
    config=Glm4MoeConfig(**{**MODELS["glm4-moe"].config.to_diff_dict(), "attention_bias": True}),
    model={**MODELS["glm4-moe"].model, "attention": {"grouped": {"bias": "qkv"}}},
)
# Documents, in which part of a head rotates, in latent attention with YaRN, in windows with sinks,
# and in a layer without positions.
APART = Documents(mask=True, reset_positions=True)
MODELS["glm4-moe-documents"] = replace(MODELS["glm4-moe"], documents=APART)
MODELS["deepseek-v3-documents"] = replace(MODELS["deepseek-v3"], documents=APART)
MODELS["smollm3-documents"] = replace(
    MODELS["smollm3"], documents=Documents(mask=True, reset_positions=False)
)
# The balancing loss of transformers takes no such masks.
GPT_OSS = MODELS["gpt-oss"]
GPT_OSS = replace(
    GPT_OSS,
    config=GptOssConfig(**{**GPT_OSS.config.to_diff_dict(), "output_router_logits": False}),
    model={**GPT_OSS.model, "moe": {**GPT_OSS.model["moe"], "load_balance": 0.0}},
)
MODELS["gpt-oss-documents"] = replace(GPT_OSS, documents=APART)
MODELS["gpt-oss-positions"] = replace(
    GPT_OSS, documents=Documents(mask=False, reset_positions=True)
)
MODELS["mixtral-masked"] = replace(MODELS["mixtral"], masked=True, tolerance=1e-5)

# Names in transformers -> names in moerun, outside the layers.
TOP = {
    "model.embed_tokens.weight": "embedding",
    "model.norm.weight": "norm",
    "lm_head.weight": "head",
}
# Names in transformers -> names in moerun, within a layer.
NAMES = {
    "input_layernorm.weight": "attention_norm",
    "post_attention_layernorm.weight": "feed_forward_norm",
    "self_attn.q_proj.weight": "attention.query",
    "self_attn.k_proj.weight": "attention.key",
    "self_attn.v_proj.weight": "attention.value",
    "self_attn.o_proj.weight": "attention.output",
    "self_attn.q_norm.weight": "attention.query_norm",
    "self_attn.k_norm.weight": "attention.key_norm",
    "self_attn.q_proj.bias": "attention.query_bias",
    "self_attn.k_proj.bias": "attention.key_bias",
    "self_attn.v_proj.bias": "attention.value_bias",
    "self_attn.o_proj.bias": "attention.output_bias",
    "self_attn.q_a_proj.weight": "attention.query_down",
    "self_attn.q_a_layernorm.weight": "attention.query_norm",
    "self_attn.q_b_proj.weight": "attention.query",
    "self_attn.kv_a_proj_with_mqa.weight": "attention.kv_down",
    "self_attn.kv_a_layernorm.weight": "attention.kv_norm",
    "self_attn.kv_b_proj.weight": "attention.kv_up",
    "self_attn.query_layernorm.weight": "attention.query_norm",
    "self_attn.key_layernorm.weight": "attention.key_norm",
    "self_attn.sinks": "attention.sinks",
    "mlp.gate.weight": "moe.gate",
    "mlp.router.weight": "moe.gate",
    "mlp.router.bias": "moe.gate_bias",
    "mlp.gate.wg.weight": "moe.gate",
    "mlp.gate.e_score_correction_bias": "moe.bias",
    "block_sparse_moe.router.weight": "moe.gate",
}
# Parameters with a matrix for each expert. They are split.
STACKED = {
    "mlp.experts.gate_up_proj": "gate_up",
    "mlp.experts.down_proj": "down",
    "mlp.experts.gate_up_proj_bias": "gate_up_bias",
    "mlp.experts.down_proj_bias": "down_bias",
    "block_sparse_moe.experts.gate_up_proj": "gate_up",
    "block_sparse_moe.experts.down_proj": "down",
}
# SwiGLU networks of three matrices. The rows of gate and up are joined.
NETWORKS = {
    "mlp": "mlp",
    "mlp.shared_experts": "moe.shared",
    "mlp.shared_mlp": "moe.shared",
}


def ours(tensors, golden):
    """Returns tensors by moerun's names, from tensors by those of transformers."""
    names = {**NAMES, **golden.names}
    out = {}
    for name, tensor in tensors.items():
        if name in TOP:
            out[TOP[name]] = tensor
            continue
        _, _, layer, rest = name.split(".", 3)
        layer = f"layers.{layer}"
        network, _, part = rest.removesuffix("_proj.weight").rpartition(".")
        if rest in names:
            out[f"{layer}.{names[rest]}"] = golden.reorder(rest, tensor)
        elif rest in STACKED:
            for expert, matrix in enumerate(golden.reorder(rest, tensor)):
                out[f"{layer}.moe.experts.{expert}.{STACKED[rest]}"] = matrix
        elif part == "gate":
            up = tensors[name.replace(".gate_proj.", ".up_proj.")]
            out[f"{layer}.{NETWORKS[network]}.gate_up"] = torch.cat([tensor, up])
        elif part == "down":
            out[f"{layer}.{NETWORKS[network]}.down"] = tensor
        elif part != "up":
            raise KeyError(f"{name} has no name in moerun")
    return out


def decays(name, parameter):
    """Returns true for matrices. Biases of experts are matrices in transformers."""
    return parameter.dim() > 1 and not name.endswith("bias")


def run(golden):
    """Trains a model and returns the tensors of its file."""
    torch.manual_seed(0)
    config = golden.config
    config._attn_implementation = "eager"
    model = golden.model_class(config).float()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, *golden.vectors)
        else:
            torch.nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        golden.adjust(model)
    ids = torch.randint(0, config.vocab_size, (3, 16))
    inputs = {}
    if golden.documents:
        ids = golden.documents.ids(ids)
        inputs = golden.documents.inputs(ids, config)
    out = {"input_ids": ids}
    labels = ids
    if golden.masked:
        labels = ids.masked_fill(torch.rand(ids.shape) < 0.4, -100)
        labels[1] = -100
        out["labels"] = labels

    def put(kind, tensors):
        for name, tensor in ours(tensors, golden).items():
            out[f"{kind}/{name}"] = tensor.detach().clone().contiguous()

    put("weight", trained)
    state = [*model.named_parameters(), *model.named_buffers()]
    biases = {n: b for n, b in state if n.endswith("bias") and n not in trained}
    put("bias", {name: bias for name, bias in biases.items() if bias.any()})
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in trained.items() if decays(n, p)], "weight_decay": 0.1},
            {"params": [p for n, p in trained.items() if not decays(n, p)], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    for step in range(3):
        optimizer.zero_grad()
        result = model(input_ids=ids, labels=labels, **inputs)
        result.loss.backward()
        if step == 0:
            put("grad", {name: parameter.grad for name, parameter in trained.items()})
            out["logits"] = result.logits.detach().clone()
            out["total_loss"] = result.loss.detach().reshape(1)
            out["loss"] = out["total_loss"].clone()
            aux_loss = getattr(result, "aux_loss", None)
            if aux_loss is not None:
                out["aux_loss"] = aux_loss.detach().reshape(1)
                weighted = config.router_aux_loss_coef * aux_loss
                out["loss"] = (result.loss - weighted).detach().reshape(1)
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        if step == 0:
            out["grad_norm"] = norm.reshape(1)
        if golden.documents:
            return out
        optimizer.step()
    put("after", trained)
    return out


def main():
    parser = argparse.ArgumentParser(description="Writes golden files.")
    folder = Path(__file__).parents[2] / "trainer/tests/golden/models"
    parser.add_argument("--output", type=Path, default=folder, help="folder of the files")
    parser.add_argument("names", nargs="*", default=sorted(MODELS), metavar="NAME")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in arguments.names:
        golden = MODELS[name]
        tensors = run(golden)
        metadata = {"model": json.dumps(golden.model), "tolerance": str(golden.tolerance)}
        if golden.documents:
            metadata["documents"] = json.dumps(asdict(golden.documents))
        path = arguments.output / f"{name}.safetensors"
        save_file(tensors, path, metadata)
        path.chmod(0o644)
        shown = [n for n in ("loss", "aux_loss", "grad_norm") if n in tensors]
        values = ", ".join(f"{n} {tensors[n].item():.6f}" for n in shown)
        print(f"{name}: {len(tensors)} tensors, {values}")


main()
