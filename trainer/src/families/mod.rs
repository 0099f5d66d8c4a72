//! Model families: their configurations and the names of their tensors.
//!
//! A family is one file that converts `config.json` to [`ModelConfig`] and back, and names the
//! tensors of a folder (`hub::rule`). The facts are those of Hugging Face transformers 5.23.0, and
//! of the released configurations where these differ.

pub(crate) mod canonical;
mod decoder_keys;
mod granitemoe;
mod granitemoeshared;
mod layer_lists;
mod llama;
mod mixtral;
mod moe_keys;
mod names;
mod olmoe;
mod qwen3;
mod qwen3_moe;
mod rope_keys;

use crate::{
    Error,
    config::ModelConfig,
    hub::{config_json::ConfigJson, rule::Names},
};

/// A family of models.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Family {
    Qwen3Moe,
    Mixtral,
    Olmoe,
    GraniteMoe,
    GraniteMoeShared,
    Llama,
    Qwen3,
}

/// The conversions of a family.
pub(crate) trait FamilyRules: Sync {
    /// The key `model_type` of `config.json`.
    fn model_type(&self) -> &'static str;

    /// The class in the key `architectures`.
    fn architecture(&self) -> &'static str;

    /// Reads the model that a `config.json` describes.
    ///
    /// # Errors
    /// If a key is missing or has a value that moerun cannot compute.
    fn read(&self, config: &ConfigJson) -> Result<ModelConfig, Error>;

    /// Sets the keys of a model. What the family cannot express is lost: the exporter reads the
    /// keys back and compares.
    fn write(&self, model: &ModelConfig, config: &mut ConfigJson);

    /// Returns the names of tensors; the first table with an entry counts.
    fn names(&self, model: &ModelConfig) -> Vec<Names>;

    /// True for tensors that the model does not use and an export repeats, such as those of
    /// multi-token prediction.
    fn carries(&self, _name: &str, _model: &ModelConfig) -> bool {
        false
    }

    /// The output layer, which a folder with tied embeddings may have twice.
    fn output_layer(&self) -> &'static str {
        "lm_head.weight"
    }
}

impl Family {
    /// All families, those that can express more first.
    pub(crate) const ALL: [Family; 7] = [
        Family::Qwen3Moe,
        Family::Mixtral,
        Family::Olmoe,
        Family::GraniteMoe,
        Family::GraniteMoeShared,
        Family::Llama,
        Family::Qwen3,
    ];

    /// Returns the family's conversions.
    pub(crate) fn rules(self) -> &'static dyn FamilyRules {
        match self {
            Family::Qwen3Moe => &qwen3_moe::Qwen3Moe,
            Family::Mixtral => &mixtral::Mixtral,
            Family::Olmoe => &olmoe::Olmoe,
            Family::GraniteMoe => &granitemoe::GraniteMoe,
            Family::GraniteMoeShared => &granitemoeshared::GraniteMoeShared,
            Family::Llama => &llama::Llama,
            Family::Qwen3 => &qwen3::Qwen3,
        }
    }

    /// Returns the family's name, which is its `model_type`.
    pub(crate) fn name(self) -> &'static str {
        self.rules().model_type()
    }

    /// Returns the family of a `config.json`.
    ///
    /// # Errors
    /// If moerun does not know it.
    pub(crate) fn of(config: &ConfigJson) -> Result<Family, Error> {
        let model_type: String = config.require(&["model_type"])?;
        let known = Family::ALL
            .iter()
            .find(|family| family.name() == model_type);
        known.copied().ok_or_else(|| {
            let names: Vec<&str> = Family::ALL.iter().map(|family| family.name()).collect();
            config.error(
                "model_type",
                format!(
                    "moerun does not know {model_type:?}; it knows {}",
                    names.join(", ")
                ),
            )
        })
    }
}
