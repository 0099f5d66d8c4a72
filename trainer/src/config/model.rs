//! The section `model`: the architecture.

use super::limits::{MAX_HEADS, MAX_LAYERS, MAX_VOCABULARY, MAX_WIDTH};
use super::multipliers::MultipliersConfig;
use crate::model::{
    attention::{AttentionConfig, grouped::QkNorm},
    moe_block::MoeConfig,
    norm::NormConfig,
    rope::RopeConfig,
};
use config_derive::ResumeKeys;
use schemars::{JsonSchema, Schema};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::path::PathBuf;

/// The architecture: a decoder-only transformer with MoE layers.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema, ResumeKeys)]
#[serde(deny_unknown_fields)]
#[schemars(transform = needs_shape_or_folder)]
pub struct ModelConfig {
    /// Folder of a Hugging Face model (`config.json` and safetensors files) whose weights a new run
    /// starts from. Its `config.json` gives the keys of this section; those of training can be set.
    /// The load-balancing loss and updates of biases are off unless they are set.
    #[on_resume(reported)]
    #[schemars(extend("format" = "path"))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<PathBuf>,
    /// Size of the vocabulary: token ids are below it.
    #[on_resume(refused)]
    #[schemars(range(min = 1, max = MAX_VOCABULARY))]
    pub vocab_size: usize,
    /// Width of the residual stream.
    #[on_resume(refused)]
    #[schemars(range(min = 1, max = MAX_WIDTH))]
    pub hidden: usize,
    /// Number of transformer layers.
    #[on_resume(refused)]
    #[schemars(range(min = 1, max = MAX_LAYERS))]
    pub layers: usize,
    /// Number of query heads per layer.
    #[on_resume(refused)]
    #[schemars(range(min = 1, max = MAX_HEADS))]
    pub heads: usize,
    /// Number of key and value heads per layer (grouped-query attention). By default `heads`.
    #[on_resume(refused)]
    #[schemars(range(min = 1, max = MAX_HEADS))]
    #[serde(default)]
    pub kv_heads: Option<usize>,
    /// Width of a head. By default `hidden / heads`.
    #[on_resume(refused)]
    #[schemars(range(min = 1, max = MAX_WIDTH))]
    #[serde(default)]
    pub head_dim: Option<usize>,
    /// Inner width of dense feed-forward layers. Needed if the model has such layers.
    #[on_resume(refused)]
    #[schemars(range(min = 1, max = MAX_WIDTH))]
    #[serde(default)]
    pub ffn: Option<usize>,
    /// Number of dense layers at the beginning of the model.
    #[on_resume(refused)]
    #[schemars(range(min = 0, max = MAX_LAYERS))]
    #[serde(default)]
    pub dense_layers: usize,
    /// Period of MoE layers after the first dense ones: 1 makes every layer an MoE layer, 2 every
    /// other one.
    #[on_resume(refused)]
    #[schemars(range(min = 1, max = MAX_LAYERS))]
    #[serde(default = "default_moe_every")]
    pub moe_every: usize,
    /// MoE layers. Without this section all layers are dense.
    #[on_resume(section)]
    #[serde(default)]
    pub moe: Option<MoeConfig>,
    /// Base of the wavelengths of rotary position embedding (theta).
    #[on_resume(refused)]
    #[schemars(range(min = 1.0, max = 1e15))]
    #[serde(default = "default_rope_theta")]
    pub rope_theta: f64,
    /// Other properties of rotary position embedding.
    #[on_resume(section)]
    #[serde(default)]
    pub rope: RopeConfig,
    /// Term added to the mean square in RMSNorm. The norms inside latent attention use 1e-6
    /// instead.
    #[on_resume(refused)]
    #[schemars(range(max = 1.0), extend("exclusiveMinimum" = 0))]
    #[serde(default = "default_norm_eps")]
    pub norm_eps: f64,
    /// Other properties of RMSNorm.
    #[on_resume(section)]
    #[serde(default)]
    pub norm: NormConfig,
    /// RMSNorm of queries and keys.
    #[on_resume(refused)]
    #[serde(default)]
    pub qk_norm: QkNorm,
    /// The kind of attention, with what it has beyond the keys above.
    #[on_resume(refused)]
    #[serde(default)]
    pub attention: AttentionConfig,
    /// Uses the transposed embedding as the output layer.
    #[on_resume(refused)]
    #[serde(default)]
    pub tie_embeddings: bool,
    /// Standard deviation of the initial weights.
    #[on_resume(reported)]
    #[schemars(range(max = 10.0), extend("exclusiveMinimum" = 0))]
    #[serde(default = "default_init_std")]
    pub init_std: f64,
    /// Maximal update parametrization. Without this section there is none.
    #[on_resume(section)]
    #[serde(default)]
    pub mup: Option<MupConfig>,
    /// Constant factors in the forward pass.
    #[on_resume(section)]
    #[serde(default)]
    pub multipliers: MultipliersConfig,
}

impl ModelConfig {
    /// Returns a model of these sizes without MoE layers, with the defaults of all other keys.
    pub fn new(vocab_size: usize, hidden: usize, layers: usize, heads: usize) -> ModelConfig {
        ModelConfig {
            from: None,
            vocab_size,
            hidden,
            layers,
            heads,
            kv_heads: None,
            head_dim: None,
            ffn: None,
            dense_layers: 0,
            moe_every: default_moe_every(),
            moe: None,
            rope_theta: default_rope_theta(),
            rope: RopeConfig::default(),
            norm_eps: default_norm_eps(),
            norm: NormConfig::default(),
            qk_norm: QkNorm::default(),
            attention: AttentionConfig::default(),
            tie_embeddings: false,
            init_std: default_init_std(),
            mup: None,
            multipliers: MultipliersConfig::default(),
        }
    }

    /// Returns the factor on the embedding's output.
    pub fn embedding_factor(&self) -> f64 {
        let mup = self.mup.as_ref().map_or(1.0, |mup| mup.embedding);
        mup * self.multipliers.embedding
    }

    /// Returns the factor on the output of each block.
    pub fn residual_factor(&self) -> f64 {
        let mup = self.mup.as_ref().map_or(1.0, |mup| mup.residual);
        mup * self.multipliers.residual
    }

    /// Returns the number by which output logits are divided.
    pub fn logits_divisor(&self) -> f64 {
        let mup = self.mup.as_ref().map_or(1.0, |mup| mup.width);
        mup / self.multipliers.logits
    }

    /// Returns the MoE section if this layer is an MoE layer.
    pub fn moe_config(&self, layer: usize) -> Option<&MoeConfig> {
        let moe = self.moe.as_ref()?;
        let is_moe = match &moe.layers {
            Some(layers) => layers.contains(layer),
            None => {
                let after_dense = layer.checked_sub(self.dense_layers);
                after_dense.is_some_and(|after| after.is_multiple_of(self.moe_every.max(1)))
            }
        };
        is_moe.then_some(moe)
    }

    /// Returns true if any layer is dense.
    pub fn has_dense_layers(&self) -> bool {
        self.num_moe_layers() < self.layers
    }

    /// Returns the number of MoE layers.
    pub fn num_moe_layers(&self) -> usize {
        (0..self.layers)
            .filter(|&layer| self.moe_config(layer).is_some())
            .count()
    }
}

/// Maximal update parametrization as in PowerMoE and Granite (arXiv 2408.13359, table 1).
///
/// The initial standard deviation of hidden matrices is divided by the square root of `width`, and
/// their learning rate by `width`. Attention logits are scaled by one over the width of a key:
/// `head_dim`, or `nope_dim + rope_dim` of latent attention. Output logits are divided by `width`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema, ResumeKeys)]
#[serde(deny_unknown_fields)]
pub struct MupConfig {
    /// Width ratio: `hidden` over the width for which the learning rates were tuned.
    #[on_resume(refused)]
    #[schemars(range(max = 1e6), extend("exclusiveMinimum" = 0))]
    pub width: f64,
    /// Factor on the embedding's output.
    #[on_resume(refused)]
    #[schemars(range(max = 1e6), extend("exclusiveMinimum" = 0))]
    #[serde(default = "unit")]
    pub embedding: f64,
    /// Factor on the output of each block before it is added to the residual stream.
    #[on_resume(refused)]
    #[schemars(range(max = 1e6), extend("exclusiveMinimum" = 0))]
    #[serde(default = "unit")]
    pub residual: f64,
}

/// Requires the keys of the shape only without a folder, which gives them.
fn needs_shape_or_folder(schema: &mut Schema) {
    if let Some(required) = schema.remove("required") {
        schema.insert("if".into(), json!({"required": ["from"]}));
        schema.insert("else".into(), json!({ "required": required }));
    }
}

fn default_moe_every() -> usize {
    1
}

fn default_rope_theta() -> f64 {
    10_000.0
}

fn default_norm_eps() -> f64 {
    1e-5
}

fn default_init_std() -> f64 {
    0.02
}

fn unit() -> f64 {
    1.0
}
