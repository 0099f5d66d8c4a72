//! Largest numbers in `config.json`, and the keys of `model` that they become.

use crate::{
    Error,
    config::limits::{MAX_EXPERTS, MAX_HEADS, MAX_LAYERS, MAX_VOCABULARY, MAX_WIDTH},
    hub::config_json::ConfigJson,
};
use serde_json::Value;

/// A key of `config.json`, its largest number, and the key that moerun's messages name.
type SizeKey = (&'static str, usize, &'static str);

const SIZES: &[SizeKey] = &[
    ("vocab_size", MAX_VOCABULARY, "model.vocab_size"),
    ("hidden_size", MAX_WIDTH, "model.hidden"),
    ("num_hidden_layers", MAX_LAYERS, "model.layers"),
    ("num_attention_heads", MAX_HEADS, "model.heads"),
    ("num_key_value_heads", MAX_HEADS, "model.kv_heads"),
    ("head_dim", MAX_WIDTH, "model.head_dim"),
    ("q_lora_rank", MAX_WIDTH, "query_rank"),
    ("kv_lora_rank", MAX_WIDTH, "kv_rank"),
    ("qk_nope_head_dim", MAX_WIDTH, "nope_dim"),
    ("qk_rope_head_dim", MAX_WIDTH, "rope_dim"),
    ("v_head_dim", MAX_WIDTH, "value_dim"),
    ("rotary_dim", MAX_WIDTH, "model.rope.fraction"),
    ("num_experts_per_tok", MAX_EXPERTS, "model.moe.top_k"),
    ("experts_per_token", MAX_EXPERTS, "model.moe.top_k"),
    ("moe_topk", MAX_EXPERTS, "model.moe.top_k"),
    ("moe_k", MAX_EXPERTS, "model.moe.top_k"),
    ("num_local_experts", MAX_EXPERTS, "model.moe.experts"),
    ("num_experts", MAX_EXPERTS, "model.moe.experts"),
    ("n_routed_experts", MAX_EXPERTS, "model.moe.experts"),
    ("moe_num_experts", MAX_EXPERTS, "model.moe.experts"),
    ("n_group", MAX_EXPERTS, "model.moe.router.groups"),
    ("topk_group", MAX_EXPERTS, "model.moe.router.top_groups"),
    ("n_shared_experts", MAX_EXPERTS, "model.moe.shared_experts"),
    (
        "num_shared_experts",
        MAX_EXPERTS,
        "model.moe.shared_experts",
    ),
    (
        "moe_num_shared_experts",
        MAX_EXPERTS,
        "model.moe.shared_experts",
    ),
    ("num_shared_expert", MAX_EXPERTS, "model.moe.shared_ffn"),
    (
        "shared_intermediate_size",
        MAX_WIDTH,
        "model.moe.shared_ffn",
    ),
    (
        "shared_expert_intermediate_size",
        MAX_WIDTH,
        "model.moe.shared_ffn",
    ),
    (
        "moe_shared_expert_intermediate_size",
        MAX_WIDTH,
        "model.moe.shared_ffn",
    ),
    ("moe_intermediate_size", MAX_WIDTH, "model.moe.ffn"),
    ("intermediate_size", MAX_WIDTH, "model.ffn"),
    ("intermediate_size", MAX_WIDTH, "model.moe.ffn"),
    ("sliding_window", usize::MAX, "window.size"),
    ("rms_norm_eps", usize::MAX, "model.norm_eps"),
    ("rope_theta", usize::MAX, "model.rope_theta"),
    ("initializer_range", usize::MAX, "model.init_std"),
    ("rope_scaling", usize::MAX, "model.rope.scaling"),
    ("rope_parameters", usize::MAX, "model.rope"),
];

/// Refuses numbers with which products of sizes could overflow.
///
/// # Errors
/// If a number is too large: with its key.
pub(super) fn check(config: &ConfigJson) -> Result<(), Error> {
    for &(key, most, _) in SIZES {
        let numbers = match config.keys().get(key) {
            Some(Value::Array(numbers)) => numbers.as_slice(),
            Some(number) => std::slice::from_ref(number),
            None => continue,
        };
        let is_more = |number: &&Value| number.as_u64().is_some_and(|number| number > most as u64);
        if let Some(number) = numbers.iter().find(is_more) {
            return Err(config.error(
                key,
                format!("{number} is more than {most}, the most possible"),
            ));
        }
    }
    Ok(())
}

/// Returns an error about a problem of the model that the configuration describes, with the key of
/// `config.json` that the first key of the problem comes from.
pub(super) fn error(config: &ConfigJson, problem: &str) -> Error {
    let position = |&&(key, _, ours): &&SizeKey| {
        let found = problem.find(ours).filter(|_| config.has(key));
        found.unwrap_or(usize::MAX)
    };
    let first = SIZES.iter().min_by_key(position);
    match first.filter(|key| position(key) < usize::MAX) {
        Some((key, _, _)) => config.error(key, problem),
        None => Error::Folder(format!("{}: {problem}", config.path().display())),
    }
}
