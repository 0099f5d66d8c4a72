//! Comparison of a saved configuration with the shapes of the saved tensors, before anything is
//! allocated by the configuration.

use super::accounting::Shapes;
use crate::config::ModelConfig;

/// Prefix of the names of saved weights.
const WEIGHTS: &str = "model/";

/// A size of the configuration and the weight that has it.
struct Size {
    key: &'static str,
    configured: u128,
    /// End of the weight's name.
    weight: &'static str,
    dim: usize,
}

/// Returns the sizes in which a configuration contradicts the saved weights `shapes`, one sentence
/// each.
///
/// Compares numbers as they are, because no check has limited them yet.
pub(super) fn shape_problems(model: &ModelConfig, shapes: &Shapes) -> Vec<String> {
    let mut problems = Vec::new();
    let configured = model.layers;
    let layers = layers(shapes);
    if layers != configured {
        problems.push(format!(
            "model.layers is {configured}, but the tensors have {layers} layers"
        ));
    }
    let tied = model.tie_embeddings;
    if shapes.contains_key(&format!("{WEIGHTS}head")) == tied {
        problems.push(format!(
            "model.tie_embeddings is {tied}, but the tensors say otherwise"
        ));
    }
    for Size {
        key,
        configured,
        weight,
        dim,
    } in sizes(model)
    {
        let mut weights = shapes.iter();
        let saved = weights.find(|(name, _)| name.starts_with(WEIGHTS) && name.ends_with(weight));
        if let Some((name, shape)) = saved
            && shape.get(dim).map(|&size| size as u128) != Some(configured)
        {
            problems.push(format!(
                "{key} is {configured}, but {name} has shape {shape:?}"
            ));
        }
    }
    problems
}

fn sizes(model: &ModelConfig) -> Vec<Size> {
    let size = |key, configured, weight, dim| Size {
        key,
        configured,
        weight,
        dim,
    };
    let hidden = model.hidden as u128;
    let heads = model.heads as u128;
    let head_dim = match model.head_dim {
        Some(head_dim) => head_dim as u128,
        None => hidden / heads.max(1),
    };
    let queries = heads * head_dim;
    let keys = model.kv_heads() as u128 * head_dim;
    let mut sizes = vec![
        size("model.vocab_size", model.vocab_size as u128, "embedding", 0),
        size("model.hidden", hidden, "embedding", 1),
        size("model.heads x head_dim", queries, ".attention.query", 0),
        size("model.kv_heads x head_dim", keys, ".attention.key", 0),
    ];
    if let Some(ffn) = model.ffn {
        sizes.push(size("model.ffn", ffn as u128, ".mlp.down", 1));
    }
    if let Some(moe) = &model.moe {
        let experts = moe.experts as u128;
        let ffn = moe.ffn as u128;
        let shared = moe.shared_experts as u128 * ffn;
        let shared_key = "model.moe.shared_experts x ffn";
        sizes.extend([
            size("model.moe.experts", experts, ".moe.gate", 0),
            size("model.moe.ffn", ffn, ".moe.experts.0.down", 1),
            size(shared_key, shared, ".moe.shared.down", 1),
        ]);
    }
    sizes
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
