//! MoE layers compared with those of HF transformers: output, chosen experts and every gradient.
//! scripts/golden/moe.py writes the golden files.

use super::{MoeConfig, build};
use crate::{
    config::Dtype,
    model::{
        BuildContext, parameters::Parameters, position::ShardPosition, rules::ParameterRules,
        weights::WeightBuilder,
    },
    process_groups::ProcessGroups,
};
use moe::{GroupScore, Router, RoutingReplay, Score};
use parallel::{Activation, Cpu, GradientBuckets, Replication, Weight, linear_f32};
use serde_json::{Value, json};
use std::{collections::BTreeMap, path::Path};
use tch::{Kind, Tensor};

const HIDDEN: usize = 24;

/// Tensors of a golden file, by name.
struct Golden(BTreeMap<String, Tensor>);

impl Golden {
    fn open(name: &str) -> Golden {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/moe");
        let path = folder.join(format!("{name}.safetensors"));
        Golden(
            Tensor::read_safetensors(path)
                .unwrap()
                .into_iter()
                .collect(),
        )
    }

    fn tensor(&self, name: &str) -> &Tensor {
        let missing = || panic!("the golden file has no {name}");
        self.0.get(name).unwrap_or_else(missing)
    }

    fn count(&self, kind: &str) -> usize {
        self.0.keys().filter(|name| name.starts_with(kind)).count()
    }

    /// Compares with the tensor `name`, relative to its largest value.
    fn assert_close(&self, name: &str, ours: &Tensor, tolerance: f64) {
        let golden = self.tensor(name);
        assert_eq!(ours.size(), golden.size(), "{name}");
        let largest = golden.abs().max().double_value(&[]);
        let worst = (ours - golden).abs().max().double_value(&[]) / largest.max(1e-12);
        assert!(worst < tolerance, "{name} differs by {worst}");
    }
}

fn load(parameters: &Parameters, golden: &Golden) {
    let mut loaded = 0;
    for parameter in parameters.iter() {
        for (slice, mut part) in parameter.slices(&parameter.master) {
            let value = golden.tensor(&format!("weight/{}", slice.name));
            tch::no_grad(|| part.copy_(value));
            loaded += 1;
        }
    }
    assert_eq!(
        loaded,
        golden.count("weight/"),
        "the layer has every golden weight"
    );
}

/// Compares the layer that `config` describes, of width [`HIDDEN`], with a golden file.
fn check(name: &str, config: Value) {
    let golden = Golden::open(name);
    let config: MoeConfig = serde_json::from_value(config).unwrap();
    let groups = ProcessGroups::single_rank();
    let ctx = BuildContext::single_rank(12, Dtype::Fp32, &Cpu, &groups);
    let rules = ParameterRules {
        init_std: 0.02,
        width: 1.0,
        layers: 1,
        zero_centered_norms: false,
    };
    let mut builder = WeightBuilder::new(rules, ShardPosition::in_groups(&groups), &ctx);
    let block = build(&mut builder, "moe", HIDDEN, &config);
    let parameters = &builder.parameters;
    load(parameters, &golden);
    if let Some(bias) = golden.0.get("bias") {
        let own = block.layer.weights.bias.lock();
        own.as_ref().unwrap().shallow_clone().copy_(bias);
    }
    let weights: Vec<_> = parameters.iter().map(|p| (p.weight.clone(), 0)).collect();
    let alone = [Replication::alone()];
    let gradients = GradientBuckets::new(&weights, &alone, 1 << 20, true, &Cpu).unwrap();
    gradients.begin(1);
    let input = golden.tensor("input").set_requires_grad(true);
    let flat = input.view([-1, HIDDEN as i64]);
    let replay = RoutingReplay::default();
    let output = block
        .layer
        .forward(&Activation::kept(&flat), 2, &replay)
        .unwrap();
    let hidden = output.hidden_td.view_as(&input);
    (&hidden * golden.tensor("probe"))
        .sum(Kind::Float)
        .backward();
    gradients.finish().unwrap();
    let (chosen, _) = output.stats.experts_tk.sort(-1, false);
    assert!(
        chosen.equal(golden.tensor("experts")),
        "{name}: other experts"
    );
    golden.assert_close("output", &hidden.detach(), 1e-5);
    golden.assert_close("grad_input", &input.grad(), 1e-4);
    for (index, parameter) in parameters.iter().enumerate() {
        for (slice, grad) in parameter.slices(&gradients.gradient(index)) {
            golden.assert_close(&format!("grad/{}", slice.name), &grad, 1e-4);
        }
    }
}

#[test]
fn gpt_oss_with_biases_and_values_beyond_the_limit() {
    check(
        "gpt_oss",
        json!({
            "experts": 6, "top_k": 3, "ffn": HIDDEN, "expert_bias": true,
            "activation": {"clamped_glu": {"alpha": 1.702, "limit": 7.0}},
            "router": {"bias": "trained"},
        }),
    );
}

#[test]
fn deepseek_v3_with_a_frozen_bias_and_groups() {
    check(
        "deepseek_v3",
        json!({
            "experts": 12, "top_k": 3, "ffn": 12, "shared_experts": 1,
            "router": {
                "score": "sigmoid", "groups": 4, "top_groups": 2, "scale": 2.5, "bias": "frozen",
            },
        }),
    );
}

#[test]
fn deepseek_v2_with_groups_and_shared_experts() {
    check(
        "deepseek_v2",
        json!({
            "experts": 12, "top_k": 3, "ffn": 12, "shared_experts": 2,
            "router": {"groups": 4, "top_groups": 2, "scale": 2.5, "normalize": false},
        }),
    );
}

#[test]
fn qwen2_with_a_gated_shared_expert_of_another_width() {
    check(
        "qwen2",
        json!({
            "experts": 6, "top_k": 2, "ffn": 12, "shared_ffn": 20, "shared_gate": true,
            "router": {"normalize": false},
        }),
    );
}

#[test]
fn mistral4_with_softmax_scores_and_the_sum_of_two_per_group() {
    check(
        "mistral4",
        json!({
            "experts": 12, "top_k": 3, "ffn": 12, "shared_experts": 1,
            "router": {
                "groups": 4, "top_groups": 2, "group_score": "top2_sum", "scale": 2.5,
            },
        }),
    );
}

/// In bf16 the product of the router and its gradients are those of fp32.
#[test]
fn a_bf16_router_computes_in_fp32() {
    let golden = Golden::open("bf16-router");
    let x = golden.tensor("input").set_requires_grad(true);
    let weight = Weight::new(golden.tensor("weight").shallow_clone());
    let alone = [Replication::alone()];
    let gradients =
        GradientBuckets::new(&[(weight.clone(), 0)], &alone, 1 << 20, true, &Cpu).unwrap();
    gradients.begin(1);
    let logits = linear_f32(&Activation::kept(&x), &weight).unwrap();
    let router = Router {
        score: Score::Sigmoid,
        scale: 2.5,
        groups: 4,
        top_groups: 2,
        group_score: GroupScore::Top2Sum,
        ..Router::new(12, 3)
    };
    let tokens = 0..40;
    let groups = std::slice::from_ref(&tokens);
    let routing = router.route(&logits, None, None, groups).unwrap();
    (&routing.weights_tk * golden.tensor("probe"))
        .sum(Kind::Float)
        .backward();
    gradients.finish().unwrap();
    assert!(routing.experts_tk.equal(golden.tensor("experts")));
    golden.assert_close("logits", &logits.detach(), 1e-6);
    golden.assert_close("routing_weights", &routing.weights_tk.detach(), 1e-6);
    // Theirs are rounded to bf16 once.
    golden.assert_close("grad_input", &x.grad(), 4e-3);
    golden.assert_close("grad_weight", &gradients.gradient(0), 4e-3);
}
