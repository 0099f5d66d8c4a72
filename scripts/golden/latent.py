"""Golden folders of families with latent attention."""

import torch
from folders import CHOICE_BIAS, Family
from quantized import FP8_CONFIG, fp8
from released import old_spelling
from shapes import SMALL, draw_choice_biases, near_seven, rope, state
from transformers import DeepseekV2Config, DeepseekV3Config, Glm4MoeLiteConfig

LATENT = dict(
    SMALL,
    num_key_value_heads=4,
    intermediate_size=20,
    moe_intermediate_size=4,
    num_experts_per_tok=2,
    q_lora_rank=12,
    # With the key that rotates, 18 rows: one block of 4 is partial.
    kv_lora_rank=14,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=10,
)
# Sequences are longer than those of pretraining.
YARN = dict(rope_type="yarn", original_max_position_embeddings=8)


def deepseek_v3(**more):
    """Returns a configuration of deepseek_v3."""
    values = dict(
        # The norms of latents keep their own term, 1e-6.
        rms_norm_eps=1e-3,
        first_k_dense_replace=1,
        n_routed_experts=8,
        n_shared_experts=1,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        num_mtp_layers=0,
        rope_parameters=rope(
            1e4,
            **YARN,
            factor=8.0,
            beta_fast=32.0,
            beta_slow=1.0,
            mscale=0.7,
            mscale_all_dim=0.9,
        ),
    )
    return DeepseekV3Config(**{**LATENT, **values, **more})


def deepseek_v2(**more):
    """Returns a configuration of deepseek_v2."""
    values = dict(first_k_dense_replace=1, n_routed_experts=8, n_shared_experts=2)
    return DeepseekV2Config(**{**LATENT, **values, **more})


def prediction_layer(tensors):
    """Returns the layer that predicts one token more. The model itself does not have it."""
    width = SMALL["hidden_size"]
    layer = f"model.layers.{SMALL['num_hidden_layers']}."
    extra = {
        f"{layer}embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(),
        f"{layer}shared_head.head.weight": tensors["lm_head.weight"].clone(),
        f"{layer}eh_proj.weight": 0.25 * torch.randn(width, 2 * width),
    }
    for name in ("enorm", "hnorm", "shared_head.norm"):
        extra[f"{layer}{name}.weight"] = 0.5 + torch.rand(width)
    for name, tensor in tensors.items():
        if name.startswith("model.layers.1."):
            extra[name.replace("model.layers.1.", layer)] = torch.randn_like(tensor)
    return extra


def round_choice_biases(module):
    """Draws choice biases that bf16 can hold."""
    draw_choice_biases(module)
    for name, bias in state(module).items():
        if name.endswith(CHOICE_BIAS):
            bias.copy_(bias.bfloat16())


def release_moonlight(tensors):
    """Returns tensors whose choice biases are stored as bf16."""
    return {
        name: tensor.bfloat16() if name.endswith(CHOICE_BIAS) else tensor
        for name, tensor in tensors.items()
    }


# Keys of released configurations, which transformers neither needs nor writes, and keys that it
# adds. Its head_dim is that of the part that rotates.
RELEASED_KEYS = dict(
    head_dim="absent",
    qk_head_dim="absent",
    rope_interleave="absent",
    moe_layer_freq=1,
    scoring_func="sigmoid",
    seq_aux=True,
    topk_method="noaux_tc",
)
# Placeholders for code that a released folder brings. It is copied when a model is exported.
KIMI_FILES = {
    "configuration_deepseek.py": (
        "from transformers import DeepseekV3Config as Base\n\n\n"
        "class DeepseekV3Config(Base):\n"
        '    model_type = "kimi_k2"\n'
    ),
    "modeling_deepseek.py": (
        "from transformers import DeepseekV3ForCausalLM as Base\n\n"
        "from .configuration_deepseek import DeepseekV3Config\n\n\n"
        "class DeepseekV3ForCausalLM(Base):\n"
        "    config_class = DeepseekV3Config\n"
    ),
}
FAMILIES = {
    "deepseek_v3": Family(deepseek_v3(), adjust=draw_choice_biases, shard=16_000),
    # transformers refuses to read blocks at the edge that are partial.
    "deepseek_v3-fp8": Family(
        deepseek_v3(),
        adjust=draw_choice_biases,
        quantize=fp8,
        release_config=lambda config: {**config, "quantization_config": FP8_CONFIG},
        reload=None,
    ),
    # With a layer for multi-token prediction, which transformers drops.
    "deepseek_v3-mtp": Family(
        deepseek_v3(num_mtp_layers=1),
        adjust=draw_choice_biases,
        extra=prediction_layer,
    ),
    # transformers has no class for it: a deepseek_v3 with its own code.
    "kimi_k2": Family(
        deepseek_v3(
            n_routed_experts=12,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=3,
            routed_scaling_factor=2.827,
            max_position_embeddings=256,
            rope_parameters=rope(
                5e4,
                **YARN,
                factor=32.0,
                beta_fast=1.0,
                beta_slow=1.0,
                mscale=1.0,
                mscale_all_dim=1.0,
            ),
        ),
        adjust=draw_choice_biases,
        release_config=old_spelling(
            **RELEASED_KEYS,
            model_type="kimi_k2",
            auto_map={
                "AutoConfig": "configuration_deepseek.DeepseekV3Config",
                "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
            },
        ),
        files=KIMI_FILES,
        reload=dict(model_type="deepseek_v3"),
    ),
    "moonlight": Family(
        deepseek_v3(
            q_lora_rank=None,
            rms_norm_eps=1e-5,
            n_routed_experts=6,
            n_shared_experts=2,
            n_group=1,
            topk_group=1,
            routed_scaling_factor=2.446,
            rope_parameters=rope(5e4),
        ),
        adjust=round_choice_biases,
        release=release_moonlight,
        release_config=old_spelling(**RELEASED_KEYS),
        seed=2,
    ),
    # As V2-Lite: YaRN scales the softmax, but neither queries nor keys.
    "deepseek_v2": Family(
        deepseek_v2(
            q_lora_rank=None,
            rms_norm_eps=1e-3,
            topk_method="greedy",
            rope_parameters=rope(
                1e4,
                **YARN,
                factor=40.0,
                beta_fast=32.0,
                beta_slow=1.0,
                mscale=0.707,
                mscale_all_dim=0.707,
            ),
        ),
    ),
    "deepseek_v2-groups": Family(
        deepseek_v2(
            topk_method="group_limited_greedy",
            n_group=4,
            topk_group=2,
            num_experts_per_tok=3,
            routed_scaling_factor=16.0,
            rope_parameters=rope(1e4),
        ),
    ),
    # transformers writes the kind of each layer where the release has a number of dense layers.
    "glm4_moe_lite": Family(
        Glm4MoeLiteConfig(
            **LATENT,
            n_routed_experts=6,
            n_shared_experts=1,
            routed_scaling_factor=1.8,
            rope_parameters=rope(1e6),
        ),
        adjust=near_seven,
    ),
}
