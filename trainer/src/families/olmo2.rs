//! OLMo 2 (arXiv 2501.00656), dense: norms of the outputs of blocks, and of all queries and keys.

use super::{
    FamilyRules,
    decoder_keys::{self, Defaults},
    names::{DECODER, POST_NORMS},
};
use crate::{
    Error,
    config::{AttentionBias, ModelConfig, NormPlacement, QkNorm},
    hub::{config_json::ConfigJson, rule::Names},
};

pub(super) struct Olmo2;

impl FamilyRules for Olmo2 {
    fn model_type(&self) -> &'static str {
        "olmo2"
    }

    fn architecture(&self) -> &'static str {
        "Olmo2ForCausalLM"
    }

    fn read(&self, config: &ConfigJson) -> Result<ModelConfig, Error> {
        let mut model = read_blocks(config, Defaults::default())?;
        model.ffn = Some(config.require(&["intermediate_size"])?);
        Ok(model)
    }

    fn write(&self, model: &ModelConfig, config: &mut ConfigJson) {
        decoder_keys::write(model, config);
        decoder_keys::write_bias(model, config);
        config.set("intermediate_size", model.ffn);
    }

    fn readers_without_head_dim(&self) -> &'static [&'static str] {
        &["SGLang"]
    }

    fn names(&self, _model: &ModelConfig) -> Vec<Names> {
        vec![POST_NORMS, DECODER]
    }
}

/// Reads a decoder with the norms of OLMo 2 and no layer's feed-forward network.
///
/// # Errors
/// If a key is missing or has a value that moerun cannot compute.
pub(super) fn read_blocks(config: &ConfigJson, defaults: Defaults) -> Result<ModelConfig, Error> {
    let mut model = decoder_keys::read(config, defaults)?;
    model.norm.placement = NormPlacement::Post;
    model.qk_norm = QkNorm::Full;
    decoder_keys::read_bias(config, &mut model, AttentionBias::All)?;
    Ok(model)
}
