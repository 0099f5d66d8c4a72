//! Constant factors in the forward pass, independent of maximal update parametrization.

use config_derive::ResumeKeys;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Constant factors in the forward pass (Granite, arXiv 2408.13359; Gemma). With `model.mup`, its
/// factors apply too, except that `attention` replaces the scale of the softmax.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema, ResumeKeys)]
#[serde(deny_unknown_fields, default)]
pub struct MultipliersConfig {
    /// Factor on the embedding's output.
    #[on_resume(refused)]
    #[schemars(range(max = 1e6), extend("exclusiveMinimum" = 0))]
    pub embedding: f64,
    /// Factor on the output of each block before it is added to the residual stream.
    #[on_resume(refused)]
    #[schemars(range(max = 1e6), extend("exclusiveMinimum" = 0))]
    pub residual: f64,
    /// Factor on the products of queries and keys, before the softmax. By default `1 / sqrt(width)`
    /// for keys of that width, or `1 / width` with `model.mup`; the width is `head_dim`, or
    /// `nope_dim + rope_dim` of latent attention. YaRN's `mscale_all_dim` multiplies it, given or
    /// not.
    #[on_resume(refused)]
    #[schemars(range(max = 1e6), extend("exclusiveMinimum" = 0))]
    pub attention: Option<f64>,
    /// Factor on the output logits. It is `1 / logits_scaling` of Granite in Hugging Face
    /// transformers.
    #[on_resume(refused)]
    #[schemars(range(max = 1e6), extend("exclusiveMinimum" = 0))]
    pub logits: f64,
}

impl Default for MultipliersConfig {
    fn default() -> MultipliersConfig {
        MultipliersConfig {
            embedding: 1.0,
            residual: 1.0,
            attention: None,
            logits: 1.0,
        }
    }
}
