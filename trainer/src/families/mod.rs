//! Model families: their configurations and the names of their tensors.
//!
//! A family is one file that converts `config.json` to [`ModelConfig`] and back, and names the
//! tensors of a folder (`hub::rule`). The facts are those of Hugging Face transformers 5.23.0, and
//! of the released configurations where these differ.

mod afmoe;
mod bailing_moe_v2;
pub(crate) mod canonical;
#[cfg(test)]
mod class_defaults;
mod decoder_keys;
mod deepseek_keys;
mod deepseek_v2;
mod deepseek_v3;
mod dots1;
mod ernie4_5_moe;
pub(crate) mod expression;
mod flex_olmo;
mod glm4_moe;
mod glm4_moe_lite;
mod gpt_oss;
mod granitemoe;
mod granitemoeshared;
mod hunyuan_v1_moe;
mod kimi_k2;
mod layer_lists;
mod llama;
mod minimax_m2;
mod mixtral;
pub(crate) mod moe_keys;
mod names;
mod olmo2;
mod olmo3;
mod olmoe;
mod qwen2_moe;
mod qwen3;
mod qwen3_moe;
mod rope_keys;
mod size_keys;

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
    Glm4Moe,
    MiniMaxM2,
    BailingMoeV2,
    Dots1,
    Qwen2Moe,
    Ernie45Moe,
    HunyuanV1Moe,
    GptOss,
    DeepseekV3,
    KimiK2,
    DeepseekV2,
    Glm4MoeLite,
    Afmoe,
    FlexOlmo,
    Olmo2,
    Olmo3,
}

/// The conversions of a family.
pub(crate) trait FamilyRules: Sync {
    /// The key `model_type` of `config.json`.
    fn model_type(&self) -> &'static str;

    /// The class in the key `architectures`.
    fn architecture(&self) -> &'static str;

    /// True if a `config.json` with this `model_type` and class is of the family.
    fn describes(&self, model_type: &str, _architecture: &str) -> bool {
        model_type == self.model_type()
    }

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

    /// Readers that take `hidden_size / num_attention_heads` for the width of a head, whatever
    /// `head_dim` says.
    fn readers_without_head_dim(&self) -> &'static [&'static str] {
        &[]
    }

    /// Further keys of this model that a reader does not obey, each as the end of a sentence about
    /// the reader.
    fn disobeyed_keys(&self, _model: &ModelConfig) -> Vec<&'static str> {
        Vec::new()
    }

    /// The output layer, which a folder with tied embeddings may have twice.
    fn output_layer(&self) -> &'static str {
        "lm_head.weight"
    }
}

impl Family {
    /// All families. Of those that can express a model, an export takes the first.
    pub(crate) const ALL: &[Family] = &[
        Family::Qwen3Moe,
        Family::Mixtral,
        Family::Olmoe,
        Family::GraniteMoe,
        Family::GraniteMoeShared,
        Family::Llama,
        Family::Qwen3,
        Family::Glm4Moe,
        Family::MiniMaxM2,
        Family::BailingMoeV2,
        Family::Dots1,
        Family::Qwen2Moe,
        Family::Ernie45Moe,
        Family::HunyuanV1Moe,
        Family::GptOss,
        Family::DeepseekV3,
        Family::KimiK2,
        Family::DeepseekV2,
        Family::Glm4MoeLite,
        Family::Afmoe,
        Family::FlexOlmo,
        Family::Olmo2,
        Family::Olmo3,
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
            Family::Glm4Moe => &glm4_moe::Glm4Moe,
            Family::MiniMaxM2 => &minimax_m2::MiniMaxM2,
            Family::BailingMoeV2 => &bailing_moe_v2::BailingMoeV2,
            Family::Dots1 => &dots1::Dots1,
            Family::Qwen2Moe => &qwen2_moe::Qwen2Moe,
            Family::Ernie45Moe => &ernie4_5_moe::Ernie45Moe,
            Family::HunyuanV1Moe => &hunyuan_v1_moe::HunyuanV1Moe,
            Family::GptOss => &gpt_oss::GptOss,
            Family::DeepseekV3 => &deepseek_v3::DeepseekV3,
            Family::KimiK2 => &kimi_k2::KimiK2,
            Family::DeepseekV2 => &deepseek_v2::DeepseekV2,
            Family::Glm4MoeLite => &glm4_moe_lite::Glm4MoeLite,
            Family::Afmoe => &afmoe::Afmoe,
            Family::FlexOlmo => &flex_olmo::FlexOlmo,
            Family::Olmo2 => &olmo2::Olmo2,
            Family::Olmo3 => &olmo3::Olmo3,
        }
    }

    /// Returns the family's name, which is its `model_type`.
    pub(crate) fn name(self) -> &'static str {
        self.rules().model_type()
    }

    /// Returns what a user should know about readers that would compute another function than this
    /// model's, one line each.
    pub(crate) fn reader_notes(self, model: &ModelConfig) -> Vec<String> {
        let rules = self.rules();
        let mut notes = Vec::new();
        let unaware = rules.readers_without_head_dim();
        let head_dim = model.attention(0).head_keys().head_dim;
        let is_other = head_dim.is_some_and(|width| width * model.heads != model.hidden);
        if is_other && !unaware.is_empty() {
            notes.push(format!(
                "{} ignores head_dim of {} models, which is not hidden_size / num_attention_heads \
                 here: it cannot serve this folder",
                unaware.join(" or "),
                self.name()
            ));
        }
        let disobeyed = rules.disobeyed_keys(model).into_iter();
        notes.extend(disobeyed.map(|ending| format!("{ending}: it cannot serve this folder")));
        notes
    }

    /// Returns the family and the model of a `config.json`.
    ///
    /// # Errors
    /// If moerun does not know it, cannot compute it, or it is not possible: with the key.
    pub(crate) fn read(config: &ConfigJson) -> Result<(Family, ModelConfig), Error> {
        let family = Family::of(config)?;
        size_keys::check(config)?;
        let model = family.rules().read(config)?;
        match model.problems().first() {
            Some(problem) => Err(size_keys::error(config, problem)),
            None => Ok((family, model)),
        }
    }

    /// Returns the family of a `config.json`.
    ///
    /// # Errors
    /// If moerun does not know it.
    pub(crate) fn of(config: &ConfigJson) -> Result<Family, Error> {
        let model_type: String = config.require(&["model_type"])?;
        let architectures: Vec<String> = config.get_or("architectures", Vec::new())?;
        let architecture = architectures.first().map_or("", String::as_str);
        let is_of = |family: &&Family| family.rules().describes(&model_type, architecture);
        let known = Family::ALL.iter().find(is_of);
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
