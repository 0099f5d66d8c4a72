//! gpt-oss (arXiv 2508.10925): windows, sinks, biases everywhere, clamped GLU, stacked experts.

use super::{
    FamilyRules,
    decoder_keys::{self, Defaults},
    layer_lists::{layer_types, sliding_layers},
    moe_keys::{self, Sizes},
    names::DECODER,
    rope_keys::{self, RopeRules},
};
use crate::{
    Error,
    config::{
        AttentionBias, ClampedGluConfig, ExpertActivation, ModelConfig, RopeScaling, RouterBias,
        RouterConfig,
    },
    hub::{
        config_json::ConfigJson,
        rule::{Names, RowOrder, named},
    },
    model::rope_scaling::YarnScaling,
};
use serde_json::json;

/// Stacks have the transposed matrices; gate and up alternate.
const NAMES: Names = &[
    ("attention.sinks", &[&[named("self_attn.sinks")]]),
    ("moe.gate", &[&[named("mlp.router.weight")]]),
    ("moe.gate_bias", &[&[named("mlp.router.bias")]]),
    (
        "moe.experts.gate_up",
        &[&[named("mlp.experts.gate_up_proj")
            .of_experts()
            .transposed()
            .ordered(RowOrder::Interleaved)]],
    ),
    (
        "moe.experts.gate_up_bias",
        &[&[named("mlp.experts.gate_up_proj_bias")
            .of_experts()
            .ordered(RowOrder::Interleaved)]],
    ),
    (
        "moe.experts.down",
        &[&[named("mlp.experts.down_proj").of_experts().transposed()]],
    ),
    (
        "moe.experts.down_bias",
        &[&[named("mlp.experts.down_proj_bias").of_experts()]],
    ),
];

/// Scaling of a configuration that says nothing about rotary embedding.
const CLASS_SCALING: YarnScaling = YarnScaling {
    factor: 32.0,
    original_length: 4096,
    beta_fast: 32.0,
    beta_slow: 1.0,
    truncate: false,
    attention_factor: None,
    mscale: None,
    mscale_all_dim: None,
};

pub(super) struct GptOss;

impl FamilyRules for GptOss {
    fn model_type(&self) -> &'static str {
        "gpt_oss"
    }

    fn architecture(&self) -> &'static str {
        "GptOssForCausalLM"
    }

    fn read(&self, config: &ConfigJson) -> Result<ModelConfig, Error> {
        config.expect("attention_bias", &[json!(true)])?;
        let defaults = Defaults {
            rope: RopeRules::with_theta(150_000.0),
            kv_heads: Some(8),
            head_dim: Some(64),
            ..Defaults::default()
        };
        let mut model = decoder_keys::read(config, defaults)?;
        if !rope_keys::is_given(config)? {
            model.rope.scaling = Some(RopeScaling::Yarn(CLASS_SCALING));
        }
        let slides = sliding_layers(config, model.layers)?;
        let size = decoder_keys::required_window(config, 128)?;
        decoder_keys::set_window(&mut model, size, |layer| match &slides {
            Some(slides) => slides[layer],
            None => layer.is_multiple_of(2),
        });
        let grouped = decoder_keys::grouped(&mut model);
        grouped.bias = AttentionBias::All;
        grouped.sinks = true;
        let sizes = Sizes {
            experts: config.require(&["num_local_experts", "num_experts"])?,
            top_k: config.require(&["num_experts_per_tok", "experts_per_token"])?,
            ffn: config.require(&["intermediate_size"])?,
        };
        let router = RouterConfig {
            bias: Some(RouterBias::Trained),
            ..moe_keys::softmax(true)
        };
        let mut moe = moe_keys::section(sizes, router);
        moe.expert_bias = true;
        moe.activation = ExpertActivation::ClampedGlu(ClampedGluConfig {
            alpha: config.get_or("swiglu_alpha", 1.702)?,
            limit: config.get_or("swiglu_limit", 7.0)?,
        });
        model.moe = Some(moe);
        Ok(model)
    }

    fn write(&self, model: &ModelConfig, config: &mut ConfigJson) {
        decoder_keys::write(model, config);
        config.set("attention_bias", true);
        config.set("sliding_window", decoder_keys::window_size(model));
        config.set("layer_types", layer_types(model));
        if let Some(moe) = &model.moe {
            moe_keys::write_experts(moe, config);
            config.set("experts_per_token", moe.top_k);
            config.set("intermediate_size", moe.ffn);
            if let ExpertActivation::ClampedGlu(glu) = moe.activation {
                config.set("swiglu_alpha", glu.alpha);
                config.set("swiglu_limit", glu.limit);
            }
        }
    }

    fn names(&self, _model: &ModelConfig) -> Vec<Names> {
        vec![NAMES, DECODER]
    }
}
