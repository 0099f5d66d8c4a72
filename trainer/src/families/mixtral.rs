//! Mixtral (arXiv 2401.04088): no norms of queries and keys, normalized softmax router.

use super::{
    FamilyRules,
    decoder_keys::{self, Defaults},
    moe_keys::{self, Sizes},
    names::{BLOCK_SPARSE_EXPERTS, DECODER},
    rope_keys::RopeRules,
};
use crate::{
    Error,
    config::ModelConfig,
    hub::{config_json::ConfigJson, rule::Names},
};

pub(super) struct Mixtral;

impl FamilyRules for Mixtral {
    fn model_type(&self) -> &'static str {
        "mixtral"
    }

    fn architecture(&self) -> &'static str {
        "MixtralForCausalLM"
    }

    fn read(&self, config: &ConfigJson) -> Result<ModelConfig, Error> {
        let defaults = Defaults {
            rope: RopeRules::with_theta(1e6),
            kv_heads: Some(8),
            ..Defaults::default()
        };
        let mut model = decoder_keys::read(config, defaults)?;
        if let Some(size) = config.get("sliding_window")? {
            decoder_keys::set_window(&mut model, size, |_| true);
        }
        let sizes = Sizes {
            experts: config.require(&["num_local_experts"])?,
            top_k: config.require(&["num_experts_per_tok"])?,
            ffn: config.require(&["intermediate_size"])?,
        };
        model.moe = Some(moe_keys::section(sizes, moe_keys::softmax(true)));
        Ok(model)
    }

    fn write(&self, model: &ModelConfig, config: &mut ConfigJson) {
        decoder_keys::write(model, config);
        config.set("sliding_window", decoder_keys::window_size(model));
        if let Some(moe) = &model.moe {
            moe_keys::write_experts(moe, config);
            config.set("intermediate_size", moe.ffn);
        }
        config.set("router_jitter_noise", 0.0);
    }

    fn readers_without_head_dim(&self) -> &'static [&'static str] {
        &["SGLang"]
    }

    fn names(&self, _model: &ModelConfig) -> Vec<Names> {
        vec![BLOCK_SPARSE_EXPERTS, DECODER]
    }
}
