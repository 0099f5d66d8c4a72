//! ERNIE 4.5 MoE: rotating elements are neighbors, softmax router with a bias that only selects.

use super::{
    FamilyRules,
    decoder_keys::{self, Defaults},
    layer_lists::{moe_layers, set_moe_layers},
    moe_keys::{self, Sizes},
    names::{DECODER, DEEPSEEK_EXPERTS, MLP_EXPERTS},
    rope_keys::RopeRules,
};
use crate::{
    Error,
    config::{ModelConfig, RouterBias, RouterConfig},
    hub::{
        config_json::ConfigJson,
        rule::{Names, RowOrder, named},
    },
};
use serde_json::json;

const NAMES: Names = &[
    (
        "attention.query",
        &[&[named("self_attn.q_proj.weight").ordered(RowOrder::AdjacentPairs)]],
    ),
    (
        "attention.key",
        &[&[named("self_attn.k_proj.weight").ordered(RowOrder::AdjacentPairs)]],
    ),
    (
        "moe.bias",
        &[&[named("mlp.moe_statics.e_score_correction_bias").in_stack_of_one()]],
    ),
];

pub(super) struct Ernie45Moe;

impl FamilyRules for Ernie45Moe {
    fn model_type(&self) -> &'static str {
        "ernie4_5_moe"
    }

    fn architecture(&self) -> &'static str {
        "Ernie4_5_MoeForCausalLM"
    }

    fn read(&self, config: &ConfigJson) -> Result<ModelConfig, Error> {
        config.expect("use_bias", &[json!(false)])?;
        let defaults = Defaults {
            rope: RopeRules::with_theta(5e5),
            tied: true,
            kv_heads: Some(4),
            ..Defaults::default()
        };
        let mut model = decoder_keys::read(config, defaults)?;
        let sizes = Sizes {
            experts: config.require(&["moe_num_experts", "num_experts"])?,
            top_k: config.require(&["moe_k", "num_experts_per_tok"])?,
            ffn: config.require(&["moe_intermediate_size"])?,
        };
        let router = RouterConfig {
            bias: Some(RouterBias::Frozen),
            ..moe_keys::softmax(true)
        };
        let mut moe = moe_keys::section(sizes, router);
        moe.shared_experts = config.get_or("moe_num_shared_experts", 2)?;
        model.moe = Some(moe);
        let last: i64 = config.get_or("moe_layer_end_index", -1)?;
        let first: i64 = config.get_or("moe_layer_start_index", 1)?;
        let interval: i64 = config.get_or("moe_layer_interval", 1)?;
        let last = if last < 0 { i64::MAX } else { last };
        let is_moe =
            |layer: i64| (first..=last).contains(&layer) && (layer + 1) % interval.max(1) == 0;
        let layers: Vec<bool> = (0..model.layers as i64).map(is_moe).collect();
        if layers.contains(&false) {
            model.ffn = Some(config.require(&["intermediate_size"])?);
        }
        set_moe_layers(&mut model, &layers);
        Ok(model)
    }

    fn write(&self, model: &ModelConfig, config: &mut ConfigJson) {
        decoder_keys::write(model, config);
        config.set("use_bias", false);
        config.set("intermediate_size", model.ffn.unwrap_or(model.hidden));
        if let Some(moe) = &model.moe {
            config.set("moe_num_experts", moe.experts);
            config.set("moe_k", moe.top_k);
            config.set("moe_intermediate_size", moe.ffn);
            let shared = moe_keys::shared_width(moe) / moe.ffn.max(1);
            config.set("moe_num_shared_experts", shared);
            config.set("moe_norm_min", 1e-12);
        }
        let layers = moe_layers(model);
        let first = layers.iter().take_while(|is_moe| !**is_moe).count();
        config.set("moe_layer_start_index", first);
        config.set("moe_layer_end_index", model.layers.saturating_sub(1));
        config.set("moe_layer_interval", 1);
    }

    fn names(&self, _model: &ModelConfig) -> Vec<Names> {
        vec![NAMES, DEEPSEEK_EXPERTS, MLP_EXPERTS, DECODER]
    }

    fn carries(&self, name: &str, _model: &ModelConfig) -> bool {
        name.starts_with("model.mtp_")
    }
}
