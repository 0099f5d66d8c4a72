//! Descriptions of all parameters of a decoder, and what follows from them.

use super::{
    activations::{Activations, BlockShape, SequenceShape},
    attention::{AttentionKeys, AttentionPlan, ScoreScale},
    core_plan::SharedMask,
    feed_forward::DensePlan,
    norm::{BlockNorms, NormNames, norm_spec},
    part::{HeadWeight, ModelPart},
    rules::ParameterRules,
    spec::{Dim, ParamSpec, Role, Split},
    work::Flops,
};
use crate::config::{ModelConfig, MoeConfig, RecomputedPart};
use std::collections::BTreeSet;

/// Number of a model's parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParameterCount {
    /// All parameters. Largest sizes exceed 64 bits.
    pub total: u128,
    /// Parameters that one token uses: those of its experts and all others.
    pub active: u128,
}

/// Properties by which layers of one model differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct LayerKind {
    has_experts: bool,
    window: Option<usize>,
    rotates: bool,
}

/// Returns the global name of layer `index`.
pub(crate) fn layer_name(index: usize) -> String {
    format!("layers.{index}")
}

/// Returns the global name of the attention block of layer `index`.
pub(crate) fn attention_name(index: usize) -> String {
    format!("{}.attention", layer_name(index))
}

/// Returns the description of the embedding, or of the output layer, by its name.
pub(crate) fn vocabulary_spec(config: &ModelConfig, part: &'static str) -> ParamSpec {
    let tokens = Dim::new("model.vocab_size", config.vocab_size as u64);
    let dims = [tokens, Dim::hidden(config.hidden)];
    ParamSpec::single("", part, &dims, Split::Vocabulary, Role::Vocabulary)
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

/// Returns the descriptions of the parameters of layer `index`, in the order of use.
pub(crate) fn layer_specs(config: &ModelConfig, index: usize) -> Vec<ParamSpec> {
    let layer = layer_name(index);
    let attention = config.attention(index).specs(&attention_name(index));
    let feed_forward = feed_forward_specs(config, index);
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

/// Returns the descriptions of the parameters of layer `index`'s feed-forward network or MoE layer.
fn feed_forward_specs(config: &ModelConfig, index: usize) -> Vec<ParamSpec> {
    let layer = layer_name(index);
    match config.moe_config(index) {
        None => config.dense().specs(&format!("{layer}.mlp")).into_list(),
        Some(moe) => moe.specs(config.hidden, &format!("{layer}.moe")),
    }
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

/// Returns the descriptions of the parameters of `part`, by the units that are gathered together,
/// in the order of use.
pub(crate) fn part_units(config: &ModelConfig, part: &ModelPart) -> Vec<Vec<ParamSpec>> {
    let ends = part.ends(config.tie_embeddings);
    let mut units = Vec::new();
    if ends.embedding {
        units.push(vec![vocabulary_spec(config, "embedding")]);
    }
    let layers = part.stages.iter().flat_map(|stage| stage.layers.clone());
    units.extend(layers.map(|layer| layer_specs(config, layer)));
    if ends.norm {
        units.push(vec![stream_norm_spec(config, "", "norm")]);
    }
    match ends.head {
        HeadWeight::None | HeadWeight::Embedding => {}
        HeadWeight::Own => units.push(vec![vocabulary_spec(config, "head")]),
        HeadWeight::EmbeddingCopy => units.push(vec![vocabulary_spec(config, "embedding")]),
    }
    units
}

/// Returns the descriptions of all parameters of a model. Layers are in order.
pub(crate) fn model_specs(config: &ModelConfig) -> impl Iterator<Item = ParamSpec> {
    let layers = (0..config.layers).flat_map(|index| layer_specs(config, index));
    end_specs(config).into_iter().chain(layers)
}

/// A bias that takes part in the selection of experts and is no parameter.
pub(crate) struct SelectionBias {
    pub(crate) name: String,
    pub(crate) experts: u64,
}

/// Returns the global name of the selection bias of the MoE block with this name.
pub(crate) fn selection_bias_name(block: &str) -> String {
    format!("{block}.bias")
}

/// Returns the biases of a model that take part in the selection of experts. Layers are in order.
pub(crate) fn selection_biases(config: &ModelConfig) -> impl Iterator<Item = SelectionBias> {
    (0..config.layers).filter_map(|index| {
        let moe = config.moe_config(index)?;
        moe.has_selection_bias().then(|| SelectionBias {
            name: selection_bias_name(&format!("{}.moe", layer_name(index))),
            experts: moe.experts as u64,
        })
    })
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
    let attention = config.attention(index).activations(at);
    let moe = config.moe_config(index);
    let feed_forward = match moe {
        None => config.dense().activations(at),
        Some(moe) => moe.activations(config.hidden, at),
    };
    saved += attention.saved + feed_forward.saved;
    // The gradient of the residual stream lives while a block runs backward.
    let transient = stream + attention.transient.max(feed_forward.transient);
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
    let uses = config.moe.as_ref().map_or(0, MoeConfig::experts_per_token);
    specs.iter().map(|spec| spec.active_elements(uses)).sum()
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

    /// Returns the plan of the attention of layer `layer`.
    pub(crate) fn attention(&self, layer: usize) -> Box<dyn AttentionPlan> {
        self.attention.plan(AttentionKeys {
            hidden: self.hidden,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            qk_norm: self.qk_norm,
            norm_eps: self.norm_eps,
            score_scale: self.score_scale(),
            latent_scale_factor: self.rope.softmax_scale_factor(),
            layer,
            layers: self.layers,
        })
    }

    /// Returns the kind of layer `index`. Layers of one kind have parameters of the same shapes and
    /// run the same kernels.
    pub(crate) fn layer_kind(&self, index: usize) -> LayerKind {
        LayerKind {
            has_experts: self.moe_config(index).is_some(),
            window: self.attention(index).core_plan().window,
            rotates: self.rope.layers.contains(index),
        }
    }

    /// Returns the masks that the attention of `layers` over these sequences needs, each once.
    pub(crate) fn shared_masks(
        &self,
        layers: impl Iterator<Item = usize>,
        sequences: &SequenceShape,
        on_host: bool,
    ) -> BTreeSet<SharedMask> {
        let mask = |layer| self.attention(layer).core_plan().mask(sequences, on_host);
        layers.filter_map(mask).collect()
    }

    /// Returns the factor on the products of queries and keys, without that of rotary embedding.
    pub(crate) fn attention_scale(&self) -> f64 {
        let width = self.attention(0).core_plan().key_width;
        self.score_scale().of_width(width)
    }

    fn score_scale(&self) -> ScoreScale {
        match self.multipliers.attention {
            Some(scale) => ScoreScale::Given(scale),
            None if self.mup.is_some() => ScoreScale::Inverse,
            None => ScoreScale::InverseRoot,
        }
    }

    /// Returns the plan of the dense layers' networks.
    pub(crate) fn dense(&self) -> DensePlan {
        DensePlan {
            hidden: self.hidden,
            ffn: Dim::new("model.ffn", self.ffn.unwrap_or(0) as u64),
        }
    }

    /// Returns how parameters are initialized and updated, by their role.
    pub(crate) fn parameter_rules(&self) -> ParameterRules {
        ParameterRules {
            init_std: self.init_std,
            width: self.mup.as_ref().map_or(1.0, |mup| mup.width),
            layers: self.layers,
            zero_centered_norms: self.norm.zero_centered,
        }
    }

    /// Returns the FLOPs of a token in layer `index`, in sequences of `length` tokens.
    pub(crate) fn layer_flops(&self, index: usize, length: usize) -> Flops {
        let mut specs = feed_forward_specs(self, index);
        specs.retain(ParamSpec::is_matrix);
        let feed_forward = Flops::of_weights(active_elements(self, &specs));
        self.attention(index).flops(length) + feed_forward
    }

    /// Returns the FLOPs of a token in the output layer.
    pub(crate) fn head_flops(&self) -> Flops {
        Flops::of_weights(vocabulary_spec(self, "head").elements())
    }

    /// Returns the FLOPs of a token in a step, forward and backward (arXiv 2204.02311, appendix B):
    /// attention counts as if every position of a sequence of `length` tokens, or of its window,
    /// saw every other.
    pub fn flops_per_token(&self, length: usize) -> f64 {
        let layers = (0..self.layers).map(|index| self.layer_flops(index, length));
        let total = layers.fold(self.head_flops(), |sum, layer| sum + layer);
        total.step()
    }

    /// Returns the forward cost of each layer over sequences of `length` tokens, in units of a mean
    /// layer.
    pub(crate) fn layer_costs(&self, length: usize) -> Vec<f64> {
        let flops = self.relative_flops(length);
        let mean = mean_of_layers(&flops);
        flops.iter().map(|flops| flops / mean).collect()
    }

    /// Returns the cost of the output layer's forward, in units of a mean layer.
    pub fn head_cost_in_layers(&self, length: usize) -> f64 {
        self.head_flops().weights / mean_of_layers(&self.relative_flops(length))
    }

    /// Returns the FLOPs of a token in each layer that tell layers apart: GEMMs with weights, and
    /// the products of activations beyond those of the layer with the fewest. Only sliding windows
    /// make these differ.
    fn relative_flops(&self, length: usize) -> Vec<f64> {
        let flops = (0..self.layers).map(|index| self.layer_flops(index, length));
        let flops: Vec<Flops> = flops.collect();
        let products = flops.iter().map(|flops| flops.activations);
        let fewest = products.fold(f64::INFINITY, f64::min);
        let beyond = |flops: &Flops| flops.weights + (flops.activations - fewest);
        flops.iter().map(beyond).collect()
    }
}

/// Returns the mean, at least 1.
fn mean_of_layers(flops: &[f64]) -> f64 {
    let mean = flops.iter().sum::<f64>() / flops.len().max(1) as f64;
    mean.max(1.0)
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

    /// Returns the global name and shape of each tensor of a model, whatever its layout.
    fn tensor_shapes(config: &ModelConfig) -> Vec<(String, Vec<i64>)> {
        let named = |spec: ParamSpec| {
            let shape = spec.shape();
            (0..spec.matrices() as usize).map(move |expert| (spec.name(expert), shape.clone()))
        };
        model_specs(config).flat_map(named).collect()
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
                model["moe"]["shared_ffn"] = json!(7);
                model["moe"]["shared_gate"] = json!(true);
            }),
            config(|model| {
                model["moe"]["expert_bias"] = json!(true);
                model["moe"]["router"] = json!({"bias": "trained"});
            }),
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
            for spec in model_specs(&config) {
                let is_vector = matches!(spec.role, Role::Norm | Role::Bias);
                assert_eq!(spec.dims.len(), if is_vector { 1 } else { 2 }, "{spec:?}");
            }
            assert_eq!(shapes, built);
        }
    }

    #[test]
    fn windows_make_layers_cheaper_and_nothing_else_does() {
        let plain = config(|model| model["head_dim"] = json!(6));
        assert_eq!(plain.layer_costs(4096), plain.layer_costs(0));
        assert_eq!(
            plain.head_cost_in_layers(4096),
            plain.head_cost_in_layers(0)
        );
        let windows = config(|model| {
            let window = json!({"size": 64, "layers": [0, 1]});
            model["attention"] = json!({"grouped": {"window": window}});
            model["dense_layers"] = json!(0);
        });
        let equal = windows.layer_costs(64);
        assert!(equal.iter().all(|&cost| cost == 1.0), "{equal:?}");
        let costs = windows.layer_costs(4096);
        assert!(
            costs[0] == costs[1] && costs[2] > 10.0 * costs[1],
            "{costs:?}"
        );
        assert!((costs.iter().sum::<f64>() - 3.0).abs() < 1e-9);
        assert!(windows.head_cost_in_layers(4096) < windows.head_cost_in_layers(64));
    }
}
