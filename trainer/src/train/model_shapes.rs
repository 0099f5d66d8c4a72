//! Comparison of a saved configuration with the shapes of the saved tensors, before anything is
//! allocated by the configuration.

use super::accounting::Shapes;
use crate::{
    config::ModelConfig,
    model::decoder::{end_specs, layer_specs},
};
use std::collections::BTreeSet;

/// Prefix of the names of saved weights.
const WEIGHTS: &str = "model/";

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
    let mut compared = BTreeSet::new();
    // Each kind of layer once: all others of the kind have the same shapes.
    let kinds = (0..layers.min(configured)).scan(BTreeSet::new(), |seen, layer| {
        Some(seen.insert(model.layer_kind(layer)).then_some(layer))
    });
    let specs = end_specs(model)
        .into_iter()
        .chain(kinds.flatten().flat_map(|layer| layer_specs(model, layer)));
    for spec in specs {
        let name = format!("{WEIGHTS}{}", spec.name(0));
        let Some(shape) = shapes.get(&name) else {
            continue;
        };
        for (index, dim) in spec.dims.iter().enumerate() {
            let Some(key) = dim.key.filter(|key| compared.insert(*key)) else {
                continue;
            };
            if shape.get(index).map(|&size| size as u64) != Some(dim.size) {
                problems.push(format!(
                    "{key} is {}, but {name} has shape {shape:?}",
                    dim.size
                ));
            }
        }
    }
    problems
}

/// Returns the number of layers with saved weights.
fn layers(shapes: &Shapes) -> usize {
    let index = |name: &String| {
        let name = name.strip_prefix(WEIGHTS)?.strip_prefix("layers.")?;
        let (index, _) = name.split_once('.')?;
        index.parse::<usize>().ok()
    };
    let layers: BTreeSet<usize> = shapes.keys().filter_map(index).collect();
    layers.len()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{decoder::model_specs, spec::ParamSpec};
    use serde_json::json;

    #[test]
    fn a_model_agrees_with_its_own_tensors() {
        for placement in ["pre", "post", "sandwich"] {
            let model: ModelConfig = serde_json::from_value(json!({
                "vocab_size": 11, "hidden": 8, "layers": 12, "heads": 2, "ffn": 6,
                "norm": {"placement": placement},
            }))
            .unwrap();
            // Without experts each description is of one tensor.
            let named = |spec: ParamSpec| (format!("{WEIGHTS}{}", spec.name(0)), spec.shape());
            let shapes: Shapes = model_specs(&model).map(named).collect();
            assert_eq!(shape_problems(&model, &shapes), Vec::<String>::new());
            assert_eq!(count_problem(&model, &shapes), None);
            let longer = ModelConfig {
                layers: 13,
                ..model
            };
            assert_eq!(
                shape_problems(&longer, &shapes),
                ["model.layers is 13, but the tensors have 12 layers"]
            );
        }
    }
}
