//! FlexOlmo (arXiv 2507.07024): the blocks of OLMo 2 with the experts of OLMoE.

use super::{
    FamilyRules,
    decoder_keys::{self, Defaults},
    moe_keys::{self, Sizes},
    names::{DECODER, MLP_EXPERTS, POST_NORMS},
    olmo2,
};
use crate::{
    Error,
    config::ModelConfig,
    hub::{config_json::ConfigJson, rule::Names},
};

pub(super) struct FlexOlmo;

impl FamilyRules for FlexOlmo {
    fn model_type(&self) -> &'static str {
        "flex_olmo"
    }

    fn architecture(&self) -> &'static str {
        "FlexOlmoForCausalLM"
    }

    fn read(&self, config: &ConfigJson) -> Result<ModelConfig, Error> {
        let defaults = Defaults {
            theta: 5e5,
            ..Defaults::default()
        };
        let mut model = olmo2::read_blocks(config, defaults)?;
        let sizes = Sizes {
            experts: config.require(&["num_experts"])?,
            top_k: config.require(&["num_experts_per_tok"])?,
            ffn: config.require(&["intermediate_size"])?,
        };
        let router = moe_keys::softmax(config.get_or("norm_topk_prob", false)?);
        model.moe = Some(moe_keys::section(sizes, router));
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

    fn names(&self, _model: &ModelConfig) -> Vec<Names> {
        vec![POST_NORMS, MLP_EXPERTS, DECODER]
    }
}
