"""Turns folders of transformers 5 into the form in which some families were released.

Released configurations have spellings that transformers 5 reads but does not write. Two families
have no class in transformers: their folders come from a model that computes the same.
"""

import torch


def old_spelling(kind="type", **more):
    """Returns how config.json becomes that of transformers 4, with more keys.

    `kind` is the key of the kind of scaling.
    """

    def release(config):
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        partial = rope.pop("partial_rotary_factor", None)
        scaling = rope.pop("rope_type")
        config["rope_scaling"] = None if scaling == "default" else {**rope, kind: scaling}
        if partial is not None:
            config["partial_rotary_factor"] = partial
        config["torch_dtype"] = config.pop("dtype")
        config["transformers_version"] = "4.57.1"
        config.update(more)
        return dict(sorted((k, v) for k, v in config.items() if v != "absent"))

    return release


# Names in glm4_moe -> names in Ling 2, within a layer.
BAILING = {
    "self_attn.o_proj.weight": "attention.dense.weight",
    "self_attn.q_norm.weight": "attention.query_layernorm.weight",
    "self_attn.k_norm.weight": "attention.key_layernorm.weight",
    "mlp.gate.e_score_correction_bias": "mlp.gate.expert_bias",
}


def release_bailing(tensors):
    """Returns tensors of Ling 2 from those of glm4_moe, which computes the same.

    Queries, keys and values are one matrix.
    """
    out = {}
    for name, tensor in tensors.items():
        layer, rest = (*name.split(".", 3)[2:], "", "")[:2]
        if name == "model.embed_tokens.weight":
            out["model.word_embeddings.weight"] = tensor
        elif not name.startswith("model.layers."):
            out[name] = tensor
        elif rest == "self_attn.q_proj.weight":
            joined = [tensors[name.replace("q_proj", part)] for part in ("k_proj", "v_proj")]
            key = f"model.layers.{layer}.attention.query_key_value.weight"
            out[key] = torch.cat([tensor, *joined])
        elif rest not in ("self_attn.k_proj.weight", "self_attn.v_proj.weight"):
            out[f"model.layers.{layer}.{BAILING.get(rest, rest)}"] = tensor
    return out


def release_bailing_config(config):
    """Returns config.json of Ling 2 from that of glm4_moe. Its model_type is not bailing_moe_v2."""
    rope = config["rope_parameters"]
    same = (
        "attention_dropout",
        "bos_token_id",
        "eos_token_id",
        "first_k_dense_replace",
        "head_dim",
        "hidden_act",
        "hidden_size",
        "initializer_range",
        "intermediate_size",
        "max_position_embeddings",
        "moe_intermediate_size",
        "n_group",
        "norm_topk_prob",
        "num_attention_heads",
        "num_experts_per_tok",
        "num_hidden_layers",
        "num_key_value_heads",
        "pad_token_id",
        "rms_norm_eps",
        "routed_scaling_factor",
        "tie_word_embeddings",
        "topk_group",
        "use_cache",
        "use_qk_norm",
        "vocab_size",
    )
    return {
        "architectures": ["BailingMoeV2ForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_bailing_moe_v2.BailingMoeV2Config",
            "AutoModel": "modeling_bailing_moe_v2.BailingMoeV2Model",
            "AutoModelForCausalLM": "modeling_bailing_moe_v2.BailingMoeV2ForCausalLM",
        },
        **{key: config[key] for key in same},
        "embedding_dropout": 0.0,
        "model_type": "bailing_moe",
        "moe_router_enable_expert_bias": True,
        "moe_shared_expert_intermediate_size": config["moe_intermediate_size"],
        "num_experts": config["n_routed_experts"],
        "num_nextn_predict_layers": 0,
        "num_shared_experts": config["n_shared_experts"],
        "output_dropout": 0.0,
        "output_router_logits": False,
        "partial_rotary_factor": rope["partial_rotary_factor"],
        "rope_scaling": None,
        "rope_theta": rope["rope_theta"],
        "router_dtype": "fp32",
        "score_function": "sigmoid",
        "torch_dtype": "float32",
        "transformers_version": "4.52.3",
        "use_bias": False,
        "use_qkv_bias": False,
        "use_rmsnorm": True,
    }
