//! OLMoE (arXiv 2409.02060): norms over all queries and all keys, softmax router.

use super::{
    FamilyRules,
    decoder_keys::{self, Defaults},
    moe_keys::{self, Sizes},
    names::{DECODER, MLP_EXPERTS},
};
use crate::{
    Error,
    config::{AttentionBias, ModelConfig, MoeConfig, QkNorm},
    hub::{config_json::ConfigJson, rule::Names},
};

/// The only `rms_norm_eps` that vLLM and SGLang know.
const FIXED_EPS: f64 = 1e-5;

pub(super) struct Olmoe;

impl FamilyRules for Olmoe {
    fn model_type(&self) -> &'static str {
        "olmoe"
    }

    fn architecture(&self) -> &'static str {
        "OlmoeForCausalLM"
    }

    fn read(&self, config: &ConfigJson) -> Result<ModelConfig, Error> {
        let mut model = decoder_keys::read(config, Defaults::default())?;
        config.expect("clip_qkv", &[])?;
        model.qk_norm = QkNorm::Full;
        decoder_keys::read_bias(config, &mut model, AttentionBias::All)?;
        model.moe = Some(read_experts(config)?);
        Ok(model)
    }

    fn write(&self, model: &ModelConfig, config: &mut ConfigJson) {
        decoder_keys::write(model, config);
        decoder_keys::write_bias(model, config);
        if let Some(moe) = &model.moe {
            moe_keys::write_experts(moe, config);
            config.set("intermediate_size", moe.ffn);
            config.set("norm_topk_prob", moe_keys::normalizes(moe));
        }
    }

    fn readers_without_head_dim(&self) -> &'static [&'static str] {
        &["vLLM", "SGLang"]
    }

    fn disobeyed_keys(&self, model: &ModelConfig) -> Vec<&'static str> {
        let mut disobeyed = Vec::new();
        if model.moe.as_ref().is_some_and(moe_keys::normalizes) {
            disobeyed
                .push("vLLM or SGLang ignores norm_topk_prob of olmoe models, which is true here");
        }
        if model.norm_eps != FIXED_EPS {
            disobeyed
                .push("vLLM or SGLang ignores rms_norm_eps of olmoe models, which is not 1e-5");
        }
        let kv_heads = model.attention(0).head_keys().kv_heads;
        if kv_heads != Some(model.heads) {
            disobeyed.push("SGLang needs as many key heads as query heads in olmoe models");
        }
        disobeyed
    }

    fn names(&self, _model: &ModelConfig) -> Vec<Names> {
        vec![MLP_EXPERTS, DECODER]
    }
}

/// Reads the experts of OLMoE: a softmax router, normalized if the key says so.
///
/// # Errors
/// If a key is missing or has another type.
pub(super) fn read_experts(config: &ConfigJson) -> Result<MoeConfig, Error> {
    let sizes = Sizes {
        experts: config.require(&["num_experts"])?,
        top_k: config.require(&["num_experts_per_tok"])?,
        ffn: config.require(&["intermediate_size"])?,
    };
    let router = moe_keys::softmax(config.get_or("norm_topk_prob", false)?);
    Ok(moe_keys::section(sizes, router))
}
