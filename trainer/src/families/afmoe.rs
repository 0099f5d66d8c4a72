//! AFMoE (Trinity): sandwich norms, gated attention, rotary embedding in layers with a window only.

use super::{
    FamilyRules,
    decoder_keys::{self, Defaults},
    deepseek_keys,
    layer_lists::{layer_types, set_of, sliding_layers},
    moe_keys::{self, Sizes},
    names::{DECODER, DEEPSEEK_EXPERTS, MLP_EXPERTS},
};
use crate::{
    Error,
    config::{LayerSet, ModelConfig, NormPlacement, QkNorm},
    hub::{
        config_json::ConfigJson,
        rule::{Names, named},
    },
};
use serde_json::json;

const NAMES: Names = &[
    (
        "attention_post_norm",
        &[&[named("post_attention_layernorm.weight")]],
    ),
    ("feed_forward_norm", &[&[named("pre_mlp_layernorm.weight")]]),
    (
        "feed_forward_post_norm",
        &[&[named("post_mlp_layernorm.weight")]],
    ),
    ("attention.gate", &[&[named("self_attn.gate_proj.weight")]]),
    ("moe.gate", &[&[named("mlp.router.gate.weight")]]),
    ("moe.bias", &[&[named("mlp.expert_bias")]]),
];

pub(super) struct Afmoe;

impl FamilyRules for Afmoe {
    fn model_type(&self) -> &'static str {
        "afmoe"
    }

    fn architecture(&self) -> &'static str {
        "AfmoeForCausalLM"
    }

    fn read(&self, config: &ConfigJson) -> Result<ModelConfig, Error> {
        config.expect("attention_bias", &[json!(false)])?;
        config.expect("score_func", &[json!("sigmoid")])?;
        config.expect("route_norm", &[json!(true)])?;
        config.expect("n_group", &[json!(1)])?;
        let defaults = Defaults {
            head_dim: Some(128),
            ..Defaults::default()
        };
        let mut model = decoder_keys::read(config, defaults)?;
        model.norm.placement = NormPlacement::Sandwich;
        model.qk_norm = QkNorm::Head;
        if config.get_or("mup_enabled", false)? {
            model.multipliers.embedding = (model.hidden as f64).sqrt();
        }
        let period: usize = config.get_or("global_attn_every_n_layers", 4)?;
        let slides = sliding_layers(config, model.layers)?.unwrap_or_else(|| {
            let is_full = |layer: usize| period > 0 && (layer + 1).is_multiple_of(period);
            (0..model.layers).map(|layer| !is_full(layer)).collect()
        });
        let size = decoder_keys::required_window(config, 1024)?;
        decoder_keys::set_window(&mut model, size, |layer| slides[layer]);
        model.rope.layers = set_of(&slides);
        if model.rope.layers == LayerSet::NONE {
            return Err(config.error("layer_types", "no layer has a window"));
        }
        decoder_keys::grouped(&mut model).output_gate = true;
        let sizes = Sizes {
            experts: config.require(&["num_experts"])?,
            top_k: config.require(&["num_experts_per_tok"])?,
            ffn: config.require(&["moe_intermediate_size"])?,
        };
        let router = moe_keys::sigmoid(true, config.get_or("route_scale", 1.0)?);
        let mut moe = moe_keys::section(sizes, router);
        moe.shared_experts = moe_keys::shared_experts(config, "num_shared_experts", Some(2))?;
        model.moe = Some(moe);
        let dense = config.get_or("num_dense_layers", 1)?;
        deepseek_keys::set_dense_layers(config, &mut model, dense)?;
        Ok(model)
    }

    fn write(&self, model: &ModelConfig, config: &mut ConfigJson) {
        decoder_keys::write(model, config);
        config.set("mup_enabled", model.embedding_factor() != 1.0);
        config.set("sliding_window", decoder_keys::window_size(model));
        config.set("layer_types", layer_types(model));
        config.set("intermediate_size", model.ffn.unwrap_or(model.hidden));
        config.set("num_dense_layers", moe_keys::leading_dense_layers(model));
        if let Some(moe) = &model.moe {
            config.set("num_experts", moe.experts);
            config.set("num_experts_per_tok", moe.top_k);
            config.set("moe_intermediate_size", moe.ffn);
            let shared = moe_keys::shared_width(moe) / moe.ffn.max(1);
            config.set("num_shared_experts", shared);
            config.set("route_scale", moe.router.scale);
            config.set("route_norm", true);
            config.set("score_func", "sigmoid");
            config.set("n_group", 1);
            config.set("topk_group", 1);
        }
    }

    fn names(&self, _model: &ModelConfig) -> Vec<Names> {
        vec![NAMES, DEEPSEEK_EXPERTS, MLP_EXPERTS, DECODER]
    }
}
