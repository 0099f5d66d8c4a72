//! Names and shapes of all tensors of a model, which follow from its configuration alone.

use crate::config::{ModelConfig, QkNorm};

/// Returns the global name and shape of each parameter of a model, whatever its layout.
pub(crate) fn tensor_shapes(config: &ModelConfig) -> Vec<(String, Vec<i64>)> {
    let hidden = config.hidden as i64;
    let vocabulary = [config.vocab_size as i64, hidden];
    let mut shapes = vec![("embedding".to_string(), vocabulary.to_vec())];
    if !config.tie_embeddings {
        shapes.push(("head".to_string(), vocabulary.to_vec()));
    }
    shapes.push(("norm".to_string(), vec![hidden]));
    for layer in 0..config.layers {
        add_layer(config, layer, &mut shapes);
    }
    shapes
}

fn add_layer(config: &ModelConfig, index: usize, shapes: &mut Vec<(String, Vec<i64>)>) {
    let hidden = config.hidden as i64;
    let width = config.head_dim() as i64;
    let queries = config.heads as i64 * width;
    let keys = config.kv_heads() as i64 * width;
    let mut add = |part: &str, shape: &[i64]| {
        shapes.push((format!("layers.{index}.{part}"), shape.to_vec()));
    };
    add("attention_norm", &[hidden]);
    add("attention.query", &[queries, hidden]);
    add("attention.key", &[keys, hidden]);
    add("attention.value", &[keys, hidden]);
    let norms = match config.qk_norm {
        QkNorm::None => None,
        QkNorm::Full => Some((queries, keys)),
        QkNorm::Head => Some((width, width)),
    };
    if let Some((query, key)) = norms {
        add("attention.query_norm", &[query]);
        add("attention.key_norm", &[key]);
    }
    add("attention.output", &[hidden, queries]);
    add("feed_forward_norm", &[hidden]);
    let mut add_swiglu = |part: &str, ffn: usize| {
        let ffn = ffn as i64;
        add(&format!("{part}.gate_up"), &[2 * ffn, hidden]);
        add(&format!("{part}.down"), &[hidden, ffn]);
    };
    let Some(moe) = config.moe_config(index) else {
        add_swiglu("mlp", config.ffn.unwrap_or(0));
        return;
    };
    for expert in 0..moe.experts {
        add_swiglu(&format!("moe.experts.{expert}"), moe.ffn);
    }
    if moe.shared_experts > 0 {
        add_swiglu("moe.shared", moe.shared_experts * moe.ffn);
    }
    add("moe.gate", &[moe.experts as i64, hidden]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::Dtype,
        model::{BuildContext, Model, ModelPart},
        process_groups::ProcessGroups,
    };
    use parallel::Cpu;
    use serde_json::{Value, json};
    use std::collections::BTreeMap;

    fn config(change: impl FnOnce(&mut Value)) -> ModelConfig {
        let mut config = json!({
            "layers": 3, "hidden": 8, "heads": 4, "kv_heads": 2, "vocab_size": 11,
            "ffn": 6, "dense_layers": 1,
            "moe": {"experts": 3, "top_k": 1, "ffn": 5},
        });
        change(&mut config);
        serde_json::from_value(config).unwrap()
    }

    #[test]
    fn they_are_those_of_the_model() {
        let configs = [
            config(|_| ()),
            config(|model| model["tie_embeddings"] = json!(true)),
            config(|model| model["qk_norm"] = json!("full")),
            config(|model| model["qk_norm"] = json!("head")),
            config(|model| model["moe"]["shared_experts"] = json!(2)),
            config(|model| {
                model["moe"] = Value::Null;
                model.as_object_mut().unwrap().remove("dense_layers");
            }),
            config(|model| model["head_dim"] = json!(6)),
        ];
        for config in configs {
            let groups = ProcessGroups::single_rank();
            let ctx = BuildContext::single_rank(4, Dtype::Fp32, &Cpu, &groups);
            let model = Model::new(&config, ModelPart::whole(config.layers), &ctx);
            let mut built = BTreeMap::new();
            for parameter in model.parameters.iter() {
                for (slice, _) in parameter.slices(&parameter.master) {
                    assert_eq!(slice.shape, slice.global_shape);
                    built.insert(slice.name, slice.shape);
                }
            }
            let shapes = tensor_shapes(&config);
            let elements = shapes
                .iter()
                .map(|(_, shape)| shape.iter().product::<i64>() as u128);
            assert_eq!(elements.sum::<u128>(), config.num_parameters().total);
            let count = shapes.len();
            let shapes: BTreeMap<_, _> = shapes.into_iter().collect();
            assert_eq!(shapes.len(), count, "each name once");
            assert_eq!(shapes, built);
        }
    }
}
