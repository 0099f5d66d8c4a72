//! Names of tensors that several families share.

use crate::hub::rule::{LAYERS, Names, RowOrder, named};

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

/// Names of latent attention (DeepSeek). Rotating rows are pairs of neighbors, after the others of
/// a head.
pub(super) const LATENT: Names = &[
    (
        "attention.query_down",
        &[&[named("self_attn.q_a_proj.weight")]],
    ),
    (
        "attention.query_norm",
        &[&[named("self_attn.q_a_layernorm.weight")]],
    ),
    (
        "attention.query",
        &[
            &[named("self_attn.q_b_proj.weight").ordered(RowOrder::AdjacentPairsLast)],
            &[named("self_attn.q_proj.weight").ordered(RowOrder::AdjacentPairsLast)],
        ],
    ),
    (
        "attention.kv_down",
        &[&[named("self_attn.kv_a_proj_with_mqa.weight").ordered(RowOrder::AdjacentPairs)]],
    ),
    (
        "attention.kv_norm",
        &[&[named("self_attn.kv_a_layernorm.weight")]],
    ),
    ("attention.kv_up", &[&[named("self_attn.kv_b_proj.weight")]]),
];

/// Name of queries that come from the residual stream.
pub(super) const DIRECT_QUERY: Names = &[(
    "attention.query",
    &[&[named("self_attn.q_proj.weight").ordered(RowOrder::AdjacentPairsLast)]],
)];

/// Names of shared experts, and of the bias that selects experts (DeepSeek).
pub(super) const DEEPSEEK_EXPERTS: Names = &[
    (
        "moe.shared.gate_up",
        &[&[
            named("mlp.shared_experts.gate_proj.weight"),
            named("mlp.shared_experts.up_proj.weight"),
        ]],
    ),
    (
        "moe.shared.down",
        &[&[named("mlp.shared_experts.down_proj.weight")]],
    ),
    ("moe.bias", &[&[named("mlp.gate.e_score_correction_bias")]]),
];

/// Names of norms of the outputs of blocks, without norms of their inputs (OLMo 2).
pub(super) const POST_NORMS: Names = &[
    (
        "attention_post_norm",
        &[&[named("post_attention_layernorm.weight")]],
    ),
    (
        "feed_forward_post_norm",
        &[&[named("post_feedforward_layernorm.weight")]],
    ),
];

/// True for the tensors of layers after the last one, which predict further tokens.
pub(super) fn is_of_later_layer(name: &str, layers: usize) -> bool {
    let rest = name
        .strip_prefix(LAYERS)
        .and_then(|rest| rest.strip_prefix('.'));
    let layer = rest.and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
    layer.is_some_and(|layer| layer >= layers)
}
