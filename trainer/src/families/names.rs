//! Names of tensors that several families share.

use crate::hub::rule::{Names, named};

/// Names of a decoder in the form of Llama.
pub(super) const DECODER: Names = &[
    ("embedding", &[&[named("model.embed_tokens.weight")]]),
    ("norm", &[&[named("model.norm.weight")]]),
    ("head", &[&[named("lm_head.weight")]]),
    ("attention_norm", &[&[named("input_layernorm.weight")]]),
    (
        "feed_forward_norm",
        &[&[named("post_attention_layernorm.weight")]],
    ),
    ("attention.query", &[&[named("self_attn.q_proj.weight")]]),
    ("attention.key", &[&[named("self_attn.k_proj.weight")]]),
    ("attention.value", &[&[named("self_attn.v_proj.weight")]]),
    ("attention.output", &[&[named("self_attn.o_proj.weight")]]),
    ("attention.query_bias", &[&[named("self_attn.q_proj.bias")]]),
    ("attention.key_bias", &[&[named("self_attn.k_proj.bias")]]),
    ("attention.value_bias", &[&[named("self_attn.v_proj.bias")]]),
    (
        "attention.output_bias",
        &[&[named("self_attn.o_proj.bias")]],
    ),
    (
        "attention.query_norm",
        &[&[named("self_attn.q_norm.weight")]],
    ),
    ("attention.key_norm", &[&[named("self_attn.k_norm.weight")]]),
    (
        "mlp.gate_up",
        &[&[named("mlp.gate_proj.weight"), named("mlp.up_proj.weight")]],
    ),
    ("mlp.down", &[&[named("mlp.down_proj.weight")]]),
];

/// Names of experts in `mlp.experts`, one by one or, if transformers saved them without
/// `save_original_format`, in stacks.
pub(super) const MLP_EXPERTS: Names = &[
    ("moe.gate", &[&[named("mlp.gate.weight")]]),
    (
        "moe.experts.gate_up",
        &[
            &[
                named("mlp.experts.{expert}.gate_proj.weight"),
                named("mlp.experts.{expert}.up_proj.weight"),
            ],
            &[named("mlp.experts.gate_up_proj").of_experts()],
        ],
    ),
    (
        "moe.experts.down",
        &[
            &[named("mlp.experts.{expert}.down_proj.weight")],
            &[named("mlp.experts.down_proj").of_experts()],
        ],
    ),
];

/// Names of experts in `block_sparse_moe.experts`.
pub(super) const BLOCK_SPARSE_EXPERTS: Names = &[
    ("moe.gate", &[&[named("block_sparse_moe.gate.weight")]]),
    (
        "moe.experts.gate_up",
        &[
            &[
                named("block_sparse_moe.experts.{expert}.w1.weight"),
                named("block_sparse_moe.experts.{expert}.w3.weight"),
            ],
            &[named("mlp.experts.gate_up_proj").of_experts()],
        ],
    ),
    (
        "moe.experts.down",
        &[
            &[named("block_sparse_moe.experts.{expert}.w2.weight")],
            &[named("mlp.experts.down_proj").of_experts()],
        ],
    ),
];
