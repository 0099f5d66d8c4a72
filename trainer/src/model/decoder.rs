//! Descriptions of all parameters of a decoder, and what follows from them.

use super::{
    activations::{Activations, BlockShape},
    attention::{self, AttentionSpecs},
    feed_forward::{self, Networks, SwigluSpecs},
    norm::{BlockNorms, NormNames, norm_spec},
    spec::{Dim, ParamSpec, Role, Split, Stack},
};
use crate::config::{ModelConfig, RecomputedPart};

/// Number of a model's parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParameterCount {
    /// All parameters. Largest sizes exceed 64 bits.
    pub total: u128,
    /// Parameters that one token uses: those of its experts and all others.
    pub active: u128,
}

/// Returns the global name of layer `index`.
pub(crate) fn layer_name(index: usize) -> String {
    format!("layers.{index}")
}

/// Returns the description of the embedding, or of the output layer, by its name.
pub(crate) fn vocabulary_spec(config: &ModelConfig, part: &'static str) -> ParamSpec {
    ParamSpec {
        block: String::new(),
        part,
        dims: vec![
            Dim::new("model.vocab_size", config.vocab_size as u64),
            Dim::hidden(config.hidden),
        ],
        stack: Stack::Single,
        split: Split::Vocabulary,
        role: Role::Vocabulary,
        writes_residual: false,
    }
}

/// Returns the description of a norm over the residual stream.
pub(crate) fn stream_norm_spec(config: &ModelConfig, block: &str, part: &'static str) -> ParamSpec {
    norm_spec(block, part, Dim::hidden(config.hidden), Split::Whole)
}

/// Returns the descriptions of the norms around a block of the layer with this global name.
pub(crate) fn block_norm_specs(
    config: &ModelConfig,
    layer: &str,
    names: NormNames,
) -> BlockNorms<ParamSpec> {
    BlockNorms::specs(
        config.norm.placement,
        layer,
        names,
        Dim::hidden(config.hidden),
    )
}

/// Returns the description of the network of a dense layer with this global name.
pub(crate) fn dense_specs(config: &ModelConfig, layer: &str) -> SwigluSpecs {
    let ffn = Dim::new("model.ffn", config.ffn.unwrap_or(0) as u64);
    let block = format!("{layer}.mlp");
    SwigluSpecs::new(&block, Dim::hidden(config.hidden), ffn, Networks::Dense)
}

/// Returns the descriptions of the parameters of layer `index`, in the order of use.
pub(crate) fn layer_specs(config: &ModelConfig, index: usize) -> Vec<ParamSpec> {
    let layer = layer_name(index);
    let attention = AttentionSpecs::new(config, &format!("{layer}.attention")).into_list();
    let feed_forward = match config.moe_config(index) {
        None => dense_specs(config, &layer).into_list(),
        Some(moe) => moe.specs(Dim::hidden(config.hidden), &format!("{layer}.moe")),
    };
    let mut specs = Vec::new();
    for (names, block) in [
        (NormNames::ATTENTION, attention),
        (NormNames::FEED_FORWARD, feed_forward),
    ] {
        let norms = block_norm_specs(config, &layer, names);
        specs.extend(norms.input);
        specs.extend(block);
        specs.extend(norms.output);
    }
    specs
}

/// Returns the descriptions of the parameters outside the layers.
pub(crate) fn end_specs(config: &ModelConfig) -> Vec<ParamSpec> {
    let mut specs = vec![
        vocabulary_spec(config, "embedding"),
        stream_norm_spec(config, "", "norm"),
    ];
    if !config.tie_embeddings {
        specs.push(vocabulary_spec(config, "head"));
    }
    specs
}

/// Returns the descriptions of all parameters of a model. Layers are in order.
pub(crate) fn model_specs(config: &ModelConfig) -> impl Iterator<Item = ParamSpec> {
    let layers = (0..config.layers).flat_map(|index| layer_specs(config, index));
    end_specs(config).into_iter().chain(layers)
}

/// Returns the global name and shape of each tensor of a model, whatever its layout.
pub(crate) fn tensor_shapes(config: &ModelConfig) -> Vec<(String, Vec<i64>)> {
    let named = |spec: ParamSpec| {
        let shape = spec.shape();
        (0..spec.matrices() as usize).map(move |expert| (spec.name(expert), shape.clone()))
    };
    model_specs(config).flat_map(named).collect()
}

/// Returns the bytes of activations of layer `index` on a rank.
pub(crate) fn layer_activations(
    config: &ModelConfig,
    index: usize,
    at: &BlockShape,
) -> Activations {
    let stream = at.own_tokens * config.hidden as u64 * at.element;
    let saves_outputs = at.recompute.keeps(RecomputedPart::Norm);
    let mut saved = config.norm.placement.saved_tensors(saves_outputs) * stream;
    let attention = attention::activations(config, at);
    let moe = config.moe_config(index);
    let feed_forward = match moe {
        None => {
            let columns = config.ffn.unwrap_or(0) / at.mesh.tensor;
            let hidden = config.hidden as u64;
            feed_forward::activations(at.tokens, hidden, columns as u64, at)
        }
        Some(moe) => moe.activations(config.hidden, at),
    };
    saved += attention.saved + feed_forward.saved;
    let transient = attention.transient.max(feed_forward.transient);
    if at.recompute.recomputes_layer(index) {
        Activations {
            saved: stream + moe.map_or(0, |moe| moe.replay_bytes(at)),
            transient: transient + saved,
        }
    } else {
        Activations { saved, transient }
    }
}

/// Returns the elements of `specs` that one token uses.
fn active_elements(config: &ModelConfig, specs: &[ParamSpec]) -> u128 {
    let top_k = config.moe.as_ref().map_or(0, |moe| moe.top_k) as u128;
    let active = |spec: &ParamSpec| match spec.stack {
        Stack::Experts(_) => top_k * spec.elements_per_matrix(),
        Stack::Single | Stack::GroupOfOne => spec.elements(),
    };
    specs.iter().map(active).sum()
}

impl ModelConfig {
    /// Returns the number of parameters.
    pub fn num_parameters(&self) -> ParameterCount {
        let mut count = ParameterCount {
            total: 0,
            active: 0,
        };
        let layers = (0..self.layers).map(|index| layer_specs(self, index));
        for specs in std::iter::once(end_specs(self)).chain(layers) {
            count.total += specs.iter().map(ParamSpec::elements).sum::<u128>();
            count.active += active_elements(self, &specs);
        }
        count
    }

    /// Returns the cost of the output layer's forward, in units of a mean layer's GEMMs.
    pub fn head_cost_in_layers(&self) -> f64 {
        let matrices = |index: usize| {
            let mut specs = layer_specs(self, index);
            specs.retain(|spec| spec.role != Role::Norm);
            active_elements(self, &specs)
        };
        let sum = (0..self.layers).map(matrices).sum::<u128>() as f64;
        let mean = sum / self.layers.max(1) as f64;
        vocabulary_spec(self, "head").elements() as f64 / mean.max(1.0)
    }
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
    fn descriptions_are_those_of_the_model() {
        let configs = [
            config(|_| ()),
            config(|model| model["tie_embeddings"] = json!(true)),
            config(|model| model["qk_norm"] = json!("full")),
            config(|model| model["qk_norm"] = json!("head")),
            config(|model| model["qk_norm"] = json!("head_after_rope")),
            config(|model| model["norm"] = json!({"placement": "post"})),
            config(|model| model["norm"] = json!({"placement": "sandwich"})),
            config(|model| model["moe"]["shared_experts"] = json!(2)),
            config(|model| {
                model["moe"] = Value::Null;
                model.as_object_mut().unwrap().remove("dense_layers");
            }),
            config(|model| model["head_dim"] = json!(6)),
            config(|model| {
                model["moe"]["layers"] = json!([0, 2]);
                model["dense_layers"] = json!(0);
            }),
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
