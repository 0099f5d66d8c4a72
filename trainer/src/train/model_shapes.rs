//! Comparison of a saved configuration with the shapes of the saved tensors, before anything is
//! allocated by the configuration.

use super::accounting::Shapes;
use crate::config::ModelConfig;

/// Prefix of the names of saved weights.
const WEIGHTS: &str = "model/";

/// Returns the sizes in which a configuration contradicts the saved weights `shapes`, one sentence
/// each.
///
/// Compares numbers as they are, because no check has limited them yet.
pub(super) fn shape_problems(model: &ModelConfig, shapes: &Shapes) -> Vec<String> {
    let hidden = model.hidden as u128;
    let head_dim = match model.head_dim {
        Some(head_dim) => head_dim as u128,
        None => hidden / (model.heads as u128).max(1),
    };
    let layers = layers(shapes);
    let mut problems = Vec::new();
    if layers != model.layers {
        let configured = model.layers;
        problems.push(format!(
            "model.layers is {configured}, but the tensors have {layers} layers"
        ));
    }
    let ends = if model.tie_embeddings { 0 } else { 1 };
    let heads = usize::from(shapes.contains_key(&format!("{WEIGHTS}head")));
    if heads != ends {
        let tied = model.tie_embeddings;
        problems.push(format!(
            "model.tie_embeddings is {tied}, but the tensors say otherwise"
        ));
    }
    let mut expected = vec![
        ("embedding", 0, "model.vocab_size", model.vocab_size as u128),
        ("embedding", 1, "model.hidden", hidden),
        (
            ".attention.query",
            0,
            "model.heads x head_dim",
            model.heads as u128 * head_dim,
        ),
        (
            ".attention.key",
            0,
            "model.kv_heads x head_dim",
            model.kv_heads() as u128 * head_dim,
        ),
    ];
    if let Some(ffn) = model.ffn {
        expected.push((".mlp.down", 1, "model.ffn", ffn as u128));
    }
    if let Some(moe) = &model.moe {
        let shared = moe.shared_experts as u128 * moe.ffn as u128;
        expected.push((".moe.gate", 0, "model.moe.experts", moe.experts as u128));
        expected.push((".moe.experts.0.down", 1, "model.moe.ffn", moe.ffn as u128));
        expected.push((
            ".moe.shared.down",
            1,
            "model.moe.shared_experts x ffn",
            shared,
        ));
    }
    for (suffix, dim, key, configured) in expected {
        let mut weights = shapes.iter();
        let weight = weights.find(|(name, _)| name.starts_with(WEIGHTS) && name.ends_with(suffix));
        let Some((name, shape)) = weight else {
            continue;
        };
        if shape.get(dim).map(|&size| size as u128) != Some(configured) {
            problems.push(format!(
                "{key} is {configured}, but {name} has shape {shape:?}"
            ));
        }
    }
    problems
}

/// Returns the number of layers with saved weights.
fn layers(shapes: &Shapes) -> usize {
    let norms = shapes.keys();
    let norms = norms.filter(|name| name.ends_with(".attention_norm"));
    norms.count()
}

/// Returns the difference between the number of parameters of a checked configuration and that of
/// the saved weights, if there is one.
pub(super) fn count_problem(model: &ModelConfig, shapes: &Shapes) -> Option<String> {
    let weights = shapes.iter();
    let weights = weights.filter(|(name, _)| name.starts_with(WEIGHTS));
    let saved: u128 = weights
        .map(|(_, shape)| shape.iter().map(|&size| size as u128).product::<u128>())
        .sum();
    let configured = model.num_parameters().total;
    (saved != configured)
        .then(|| format!("its model has {configured} parameters, but the tensors have {saved}"))
}
