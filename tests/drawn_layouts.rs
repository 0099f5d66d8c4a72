//! Random layouts over up to 8 ranks and all axes agree with one rank, and a checkpoint of any
//! layout resumes in any other.
//!
//! `MOERUN_TEST_LAYOUTS` is their number (default 40), `MOERUN_TEST_LAYOUT_SEED` their seed. A
//! failure prints the value of `MOERUN_TEST_LAYOUT` that repeats it.

use crate::agreement::{
    TIMEOUT, TOKENS, Trace, VOCAB, assert_within, sigmoid, softmax, trace_of, trainer_on,
    write_data,
};
use dataset::tokens::TokenWriter;
use parallel::run_on_threads;
use proptest::{
    prelude::*,
    strategy::ValueTree,
    test_runner::{Config as RunnerConfig, RngAlgorithm, TestRng, TestRunner},
};
use serde_json::{Value, json};
use std::{collections::HashMap, path::Path};
use tch::Tensor;
use trainer::{config::Config, data::Dataset};

const STEPS: u64 = 4;
const SEQUENCE: u32 = 24;
const BATCH: u64 = 12;
const SEED: u64 = 5;

/// Smallest relative gap between two selections of a token that is no tie.
///
/// Layouts add a logit's products, and the gradients of a step, in different orders. Each order
/// rounds differently, by up to an epsilon of fp32 times the magnitude per operation. Over the
/// layers and steps of these runs some of that adds up. Scores that differ by less may have another
/// order in another layout.
const TIE: f64 = 16.0 * f32::EPSILON as f64;

/// Writes a mask of the data. No token of every second sequence counts, so that no token of some
/// microbatches does.
fn write_mask(folder: &Path) {
    let counts = |token: u32| {
        let window = token.saturating_sub(1) / SEQUENCE;
        u32::from(window.is_multiple_of(2) && !token.is_multiple_of(3))
    };
    let mut writer = TokenWriter::create(&folder.join("mask"), 2).unwrap();
    writer
        .push(&(0..TOKENS).map(counts).collect::<Vec<_>>())
        .unwrap();
    writer.finish().unwrap();
}

/// Random properties of rotary embedding, for heads of width 4.
fn ropes() -> impl Strategy<Value = Value> {
    let llama3 = json!({"factor": 4.0, "low": 1.0, "high": 4.0, "original_length": 16});
    prop::sample::select(vec![
        json!({}),
        json!({"fraction": 0.5, "scaling": {"linear": {"factor": 2.0}}}),
        json!({"layers": [0, 2], "scaling": {"llama3": llama3}}),
        json!({"scaling": {"dynamic": {"factor": 4.0, "original_length": 8}}}),
        json!({"scaling": {"ntk_alpha": {"alpha": 100.0}}}),
        json!({"scaling": {"yarn": {"factor": 4.0, "original_length": 8}}}),
        json!({"scaling": {"longrope": {
            "short": [1.0, 2.0], "long": [2.0, 4.0], "factor": 3.0, "original_length": 8,
        }}}),
    ])
}

/// Random placements and weights of norms.
fn norms() -> impl Strategy<Value = Value> {
    let placements = prop::sample::select(vec!["pre", "post", "sandwich"]);
    let norms = (placements, any::<bool>());
    norms.prop_map(|(placement, zero_centered)| {
        json!({"placement": placement, "zero_centered": zero_centered})
    })
}

/// Random factors in the forward pass, or none.
fn multipliers() -> impl Strategy<Value = Value> {
    let factors = json!({"embedding": 3.0, "residual": 0.4, "attention": 0.3, "logits": 0.7});
    prop::sample::select(vec![json!({}), factors])
}

/// Random properties of rotary embedding for latent attention, whose softmax YaRN may scale.
fn latent_ropes() -> impl Strategy<Value = Value> {
    let yarn = |factors: Value| {
        let mut yarn = json!({"factor": 4.0, "original_length": 8});
        for (key, value) in factors.as_object().unwrap() {
            yarn[key] = value.clone();
        }
        Just(json!({"scaling": {"yarn": yarn}}))
    };
    prop_oneof![
        2 => ropes(),
        1 => yarn(json!({"mscale": 0.7, "mscale_all_dim": 0.9})),
        1 => yarn(json!({"mscale_all_dim": 1.0})),
    ]
}

/// Random kinds of attention, whose rotating width is 4.
fn attentions() -> impl Strategy<Value = Value> {
    prop::sample::select(vec![
        json!({"grouped": {}}),
        json!({"grouped": {"window": {"size": 5}, "output_gate": true}}),
        json!({"grouped": {"window": {"size": 9, "layers": {"every": 2}}, "sinks": true}}),
        json!({"grouped": {"bias": "all", "sinks": true}}),
        json!({"grouped": {"bias": "qkv", "output_gate": true}}),
        json!({"latent": {
            "query_rank": 7, "kv_rank": 10, "nope_dim": 3, "rope_dim": 4, "value_dim": 5,
        }}),
        json!({"latent": {"kv_rank": 8, "nope_dim": 4, "rope_dim": 4, "value_dim": 6}}),
    ])
}

/// Random keys of experts.
fn experts() -> impl Strategy<Value = Value> {
    // No value reaches the limit: rounding would decide about values close to it, and each layout
    // rounds differently.
    let clamped = json!({"clamped_glu": {"limit": 7.0}});
    prop::sample::select(vec![
        json!({}),
        json!({"expert_bias": true}),
        json!({"expert_bias": true, "activation": clamped, "shared_experts": 0}),
        json!({"activation": clamped, "shared_experts": 0, "shared_ffn": 36}),
        json!({"shared_experts": 0, "shared_ffn": 12, "shared_gate": true}),
        json!({"shared_experts": 2, "shared_gate": true}),
    ])
}

/// Random keys of routers, for 12 experts.
fn routers() -> impl Strategy<Value = Value> {
    let groups = |score: &str| json!({"groups": 4, "top_groups": 2, "group_score": score});
    prop::sample::select(vec![
        json!({}),
        json!({"bias": "trained"}),
        json!({"bias": "frozen"}),
        groups("max"),
        groups("top2_sum"),
    ])
}

/// Changes keys of the section `model.moe`.
fn change_moe(moe: &mut Value, experts: &Value, router: &Value) {
    if router.get("bias").is_some() {
        moe["bias_update_rate"] = json!(0.0);
    }
    for (key, value) in experts.as_object().unwrap() {
        moe[key] = value.clone();
    }
    for (key, value) in router.as_object().unwrap() {
        moe["router"][key] = value.clone();
    }
}

/// Random keys of the section `model`.
fn variants() -> impl Strategy<Value = Value> {
    let qk_norms = prop::sample::select(vec!["none", "full", "head", "head_after_rope"]);
    let attentions = attentions().prop_flat_map(|attention| {
        let ropes = match attention.get("latent") {
            Some(_) => latent_ropes().boxed(),
            None => ropes().boxed(),
        };
        (Just(attention), ropes)
    });
    let keys = (attentions, norms(), qk_norms, multipliers());
    keys.prop_map(|((attention, mut rope), norm, qk_norm, multipliers)| {
        if !attention["grouped"]["bias"].is_null() {
            // Where keys do not rotate, their bias has no effect: its gradient would be noise.
            rope.as_object_mut().unwrap().remove("layers");
        }
        json!({
            "rope": rope, "norm": norm, "qk_norm": qk_norm, "multipliers": multipliers,
            "attention": attention,
        })
    })
}

/// Random models and data: everything that determines the results of one rank.
fn models() -> impl Strategy<Value = Value> {
    let statistics = prop::sample::select(vec!["sequence", "microbatch", "batch"]);
    let documents = prop::option::weighted(0.5, 0u32..3);
    // Whether documents are kept apart, and whether positions begin at 0 in each.
    let rules = (any::<bool>(), any::<bool>());
    // Whether the label after the end of a document counts, and whether all others do.
    let masks = (any::<bool>(), any::<bool>());
    let scores = any::<bool>();
    let tied = any::<bool>();
    let micro_batches = prop::sample::select(vec![1, 2]);
    let optimizers = prop::sample::select(vec![
        json!({}),
        json!({"state_dtype": "bf16"}),
        json!({"groups": [{"muon": {}}]}),
        json!({"groups": [{"roles": ["router"], "muon": {"adjust_lr": "original"}}, {"muon": {}}]}),
        json!({"groups": [{"muon": {"nesterov": false}}, {"sgd": {}}]}),
        json!({"groups": [{"sgd": {"nesterov": true}}], "state_dtype": "bf16"}),
        json!({"qk_clip": {"threshold": 0.3}}),
        json!({"qk_clip": {"threshold": 0.1}, "groups": [{"muon": {}}]}),
    ]);
    (
        statistics,
        scores,
        tied,
        micro_batches,
        // The number of dense layers at the beginning, or a dense layer between MoE layers.
        prop::option::of(0usize..2),
        (documents, rules, masks),
        (optimizers, variants(), experts(), routers()),
    )
        .prop_map(
            |(over, sigmoid_scores, tied, micro_batch, dense_layers, data, rest)| {
                let (optimizer, variants, experts, router) = rest;
                let (documents, (mask_documents, reset_positions), masks) = data;
                let (eod_mask_loss, mask) = masks;
                let mut moe = if sigmoid_scores {
                    sigmoid(over)
                } else {
                    softmax(over)
                };
                moe["experts"] = json!(12);
                moe["ffn"] = json!(24);
                change_moe(&mut moe, &experts, &router);
                if dense_layers.is_none() {
                    moe["layers"] = json!([0, 2]);
                }
                let heads = if tied { (6, 3) } else { (12, 2) };
                let mut model = json!({
                    "vocab_size": VOCAB + 3, "hidden": 24, "layers": 3, "heads": heads.0,
                    "kv_heads": heads.1, "head_dim": 4, "ffn": 48,
                    "dense_layers": dense_layers.unwrap_or(0),
                    "moe": moe, "init_std": 0.1, "tie_embeddings": tied,
                });
                let keys = model.as_object_mut().unwrap();
                keys.extend(variants.as_object().unwrap().clone());
                if variants["attention"].get("latent").is_some() {
                    for key in ["kv_heads", "head_dim", "qk_norm"] {
                        keys.remove(key);
                    }
                }
                if optimizer.get("qk_clip").is_some() {
                    keys.remove("qk_norm");
                }
                json!({
                    "model": model,
                    "optimizer": optimizer,
                    "micro_batch": micro_batch,
                    "eod_token": documents,
                    "mask_documents": mask_documents && documents.is_some(),
                    "reset_positions": reset_positions && documents.is_some(),
                    "eod_mask_loss": eod_mask_loss && documents.is_some(),
                    "mask": mask,
                })
            },
        )
}

/// Random layouts over every axis. Combinations that cannot run are drawn again.
fn layouts() -> impl Strategy<Value = (usize, Value)> {
    let sizes = (1usize..5, 1usize..4, 1usize..4, 1usize..5);
    let sizes = sizes.prop_filter("at most 8 ranks", |(data, tensor, context, pipeline)| {
        (2..=8).contains(&(data * tensor * context * pipeline))
    });
    let schedules = [
        "gpipe",
        "1f1b",
        "interleaved",
        "zb-h1",
        "zb-v",
        "v-half",
        "v-min",
        "dualpipe-v",
    ];
    let pipelines = (
        prop::sample::select(schedules.to_vec()),
        prop::sample::select(vec![
            "baseline",
            "redis",
            "naive",
            "interlaced",
            "vocab-1",
            "vocab-2",
        ]),
    );
    let parts = prop::sample::subsequence(vec!["norm", "attention", "dispatch", "experts"], 0..=4);
    let whole = prop::sample::select(vec![json!("none"), json!("all"), json!([0, 2])]);
    let sharding = (
        0u8..4,
        any::<prop::sample::Index>(),
        any::<prop::sample::Index>(),
    );
    let dispatch = prop::sample::select(vec![
        "standard",
        "least_loaded",
        "hierarchical",
        "hierarchical_least_loaded",
    ]);
    let nodes = prop::option::of(1usize..5);
    let rest = (
        prop::sample::select(vec!["ring", "ulysses"]),
        1usize..4,
        prop::sample::select(vec![0.01, 25.0]),
    );
    let rest = (rest, dispatch, nodes, any::<bool>(), 1usize..4);
    (sizes, pipelines, parts, whole, sharding, rest).prop_map(
        |(sizes, (schedule, vocabulary), parts, whole, (zero, fold, block), rest)| {
            let (data, tensor, context, pipeline) = sizes;
            let stage = data * tensor * context;
            let fits = |&(expert, slices): &(usize, usize)| stage.is_multiple_of(expert * slices);
            let pairs = (1..=stage).flat_map(|expert| (1..=stage).map(move |s| (expert, s)));
            let folds: Vec<_> = pairs.filter(fits).collect();
            let (expert, expert_tensor) = folds[fold.index(folds.len())];
            let replicas = data * context;
            let blocks: Vec<usize> = (1..=replicas)
                .filter(|block| replicas.is_multiple_of(*block))
                .collect();
            let (options, dispatch, per_node, placement, expert_chunks) = rest;
            let (context_attention, tensor_chunks, bucket_mib) = options;
            let mut parallel = json!({
                "data": data, "tensor": tensor, "context": context, "pipeline": pipeline,
                "expert": expert, "expert_tensor": expert_tensor,
                "context_attention": context_attention, "tensor_chunks": tensor_chunks,
                "expert_chunks": expert_chunks, "bucket_mib": bucket_mib, "zero": zero,
                "recompute": {"layers": whole, "parts": parts},
                "dispatch": dispatch, "ranks_per_node": per_node, "placement": placement,
            });
            if pipeline > 1 {
                parallel["schedule"] = json!(schedule);
                parallel["vocabulary"] = json!(vocabulary);
            }
            if zero > 0 {
                parallel["zero_group_size"] = json!(blocks[block.index(blocks.len())]);
            }
            (stage * pipeline, parallel)
        },
    )
}

/// Returns a configuration. `parallel` also contains the dispatch and the placement.
fn config(folder: &Path, model: &Value, parallel: &Value) -> Config {
    let mut model = model.clone();
    let mut parallel = parallel.clone();
    if let Some(dispatch) = parallel.as_object_mut().unwrap().remove("dispatch") {
        if dispatch.as_str().unwrap().contains("least_loaded") {
            // A low price, so that experts are lent although there are few tokens.
            model["model"]["moe"]["least_loaded"] = json!({"min_tokens": 0, "threshold": 1.0});
        }
        model["model"]["moe"]["dispatch"] = dispatch;
        if parallel.as_object_mut().unwrap().remove("placement") == Some(json!(true)) {
            model["model"]["moe"]["placement"] = json!({"every": 1, "min_gain": 0.0});
        }
    }
    // A large eps: AdamW's first steps would otherwise turn the sign of rounding noise into a step.
    let mut optimizer = model["optimizer"].clone();
    optimizer["eps"] = json!(1e-4);
    let mask = (model["mask"] == json!(true)).then(|| folder.join("mask"));
    let config = json!({
        "run": {"dir": folder.join("run"), "device": "cpu", "seed": SEED},
        "parallel": parallel,
        "model": model["model"],
        "data": {
            "train": [{"path": folder.join("tokens"), "mask": mask}],
            "sequence_length": SEQUENCE,
            "eod_token": model["eod_token"],
            "mask_documents": model["mask_documents"],
            "reset_positions": model["reset_positions"] == json!(true),
            "eod_mask_loss": model["eod_mask_loss"] == json!(true),
        },
        "train": {
            "steps": STEPS,
            "global_batch": BATCH,
            "micro_batch": model["micro_batch"],
            "grad_clip": 0.5,
        },
        "optimizer": optimizer,
        "schedule": {"constant": {"lr": 3e-3}},
        "checkpoint": {"every": 0},
    });
    serde_json::from_value(config).unwrap()
}

/// Returns the largest relative difference of layouts. Rounding noise may change the direction in
/// which a moment in bf16 is rounded, and then the moment by a part in 256. Vectors that started
/// as zeros consist of few updates.
fn tolerance(model: &Value) -> f64 {
    if model["optimizer"]["state_dtype"] == "bf16" {
        1e-3
    } else if !model["model"]["attention"]["grouped"]["bias"].is_null() {
        // The bias of keys shifts the scores of a query almost alike, so its gradient nearly
        // cancels.
        5e-5
    } else {
        1e-5
    }
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| {
        text.parse()
            .unwrap_or_else(|_| panic!("{name} is not a number: {text}"))
    })
}

fn runner(salt: u8) -> TestRunner {
    let mut seed = [salt; 32];
    seed[..8].copy_from_slice(&number("MOERUN_TEST_LAYOUT_SEED", 1).to_le_bytes());
    TestRunner::new_with_rng(
        RunnerConfig::default(),
        TestRng::from_seed(RngAlgorithm::ChaCha, &seed),
    )
}

/// Draws layouts until one can run `model`.
fn draw(runner: &mut TestRunner, folder: &Path, model: &Value) -> (usize, Value) {
    loop {
        let (ranks, parallel) = layouts().new_tree(runner).unwrap().current();
        if config(folder, model, &parallel).problems(ranks).is_empty() {
            return (ranks, parallel);
        }
    }
}

/// Results of models on one rank.
#[derive(Default)]
struct Singles {
    traces: HashMap<String, Trace>,
    /// Models that were drawn again because of a tie.
    redrawn: usize,
}

impl Singles {
    fn trace(&mut self, folder: &Path, model: &Value) -> &Trace {
        let traces = self.traces.entry(model.to_string());
        traces.or_insert_with(|| trace_of(1, config(folder, model, &json!({}))))
    }

    /// Draws models until no token of one has a tie between experts or groups, which rounding
    /// decides.
    fn draw(&mut self, runner: &mut TestRunner, folder: &Path) -> Value {
        loop {
            let model = models().new_tree(runner).unwrap().current();
            let gap = self.trace(folder, &model).smallest_gap;
            if gap > TIE {
                return model;
            }
            self.redrawn += 1;
            eprintln!("drawn again: a token's selections are only {gap:e} apart in {model}");
            assert!(self.redrawn < 1000, "almost all models have ties");
        }
    }
}

/// Returns the number of microbatches of a run without a counted token.
fn uncounted_microbatches(config: &Config) -> u64 {
    let data = Dataset::open(&config.data.train, SEQUENCE as usize, VOCAB + 3, SEED).unwrap();
    let data = data.masked_after(config.data.eod_token.filter(|_| config.data.eod_mask_loss));
    let size = config.train.micro_batch as u64;
    let is_uncounted = |number: &u64| {
        let first = number * size;
        let (_, labels) = data.batch(first..first + size).unwrap();
        labels.eq(-100).all() == Tensor::from(true)
    };
    (0..STEPS * BATCH / size).filter(is_uncounted).count() as u64
}

#[test]
fn drawn_layouts_agree_with_one_rank() {
    let folder = tempfile::tempdir().unwrap();
    write_data(folder.path());
    write_mask(folder.path());
    let mut runner = runner(1);
    let mut singles = Singles::default();
    let count = number("MOERUN_TEST_LAYOUTS", 40);
    let mut seen = HashMap::new();
    let given: Option<Value> = std::env::var("MOERUN_TEST_LAYOUT")
        .ok()
        .map(|text| serde_json::from_str(&text).unwrap());
    for _ in 0..count {
        let drawn = given.clone().unwrap_or_else(|| {
            let model = singles.draw(&mut runner, folder.path());
            let (ranks, parallel) = draw(&mut runner, folder.path(), &model);
            json!({"ranks": ranks, "parallel": parallel, "model": model})
        });
        eprintln!("MOERUN_TEST_LAYOUT='{drawn}'");
        let model = &drawn["model"];
        let parallel = &drawn["parallel"];
        let single = singles.trace(folder.path(), model);
        if single.smallest_gap <= TIE {
            let gap = single.smallest_gap;
            eprintln!("not compared: a token's selections are only {gap:e} apart");
            continue;
        }
        let ranks = drawn["ranks"].as_u64().unwrap() as usize;
        let config = config(folder.path(), model, parallel);
        *seen.entry("uncounted").or_insert(0) += uncounted_microbatches(&config);
        let ours = trace_of(ranks, config);
        let what = format!("MOERUN_TEST_LAYOUT='{drawn}'");
        assert_within(&what, &ours, single, tolerance(model));
        for axis in [
            "tensor",
            "context",
            "pipeline",
            "expert",
            "expert_tensor",
            "zero",
        ] {
            if parallel[axis].as_u64() > Some(1) {
                *seen.entry(axis).or_insert(0) += 1;
            }
        }
        if model["reset_positions"] == json!(true) {
            let rule = if model["mask_documents"] == json!(true) {
                "masked documents with positions"
            } else {
                "positions"
            };
            *seen.entry(rule).or_insert(0) += 1;
        }
        *seen.entry("lent").or_insert(0) += ours.lent_tokens;
        *seen.entry("moved").or_insert(0) += ours.moved;
        *seen.entry("clipped").or_insert(0) += ours.clipped_heads;
    }
    eprintln!("{} models were drawn again", singles.redrawn);
    let drawn = seen.values().filter(|&&count| count > 0).count();
    assert!(
        given.is_some() || count < 40 || drawn == 12,
        "an axis was never drawn: {seen:?}"
    );
}

#[test]
fn a_checkpoint_of_any_layout_resumes_in_any_other() {
    tch::set_num_threads(1);
    let folder = tempfile::tempdir().unwrap();
    write_data(folder.path());
    write_mask(folder.path());
    let mut runner = runner(2);
    let mut singles = Singles::default();
    for pair in 0..12 {
        let model = singles.draw(&mut runner, folder.path());
        let run = |name: &str, parallel: &Value| {
            let mut config = config(folder.path(), &model, parallel);
            config.run.dir = folder.path().join(format!("{pair}-{name}"));
            config
        };
        let single = singles.trace(folder.path(), &model);
        let from = draw(&mut runner, folder.path(), &model);
        let to = draw(&mut runner, folder.path(), &model);
        let what = format!(
            "from {} ranks {} to {} ranks {}, {model}",
            from.0, from.1, to.0, to.1
        );
        eprintln!("{what}");
        let first = run("pair", &from.1);
        run_on_threads(from.0, TIMEOUT, move |world| {
            let mut trainer = trainer_on(world, first.clone());
            for _ in 0..2 {
                trainer.train_step(false).unwrap();
            }
            trainer.save().unwrap();
        });
        let second = run("pair", &to.1);
        let steps = run_on_threads(to.0, TIMEOUT, move |world| {
            let mut trainer = trainer_on(world, second.clone());
            assert_eq!(
                trainer.resume(&mut |warning| panic!("{warning}")).unwrap(),
                trainer::ResumeSource::Checkpoint
            );
            (2..STEPS)
                .map(|_| trainer.train_step(false).unwrap().0)
                .map(|r| [r.loss, r.grad_norm])
                .collect::<Vec<_>>()
        });
        for (ours, reference) in steps[0].iter().zip(&single.steps[2..]) {
            for (a, b) in ours.iter().zip([reference[0], reference[3]]) {
                let allowed = tolerance(&model) * b;
                assert!((a - b).abs() <= allowed, "{what}: {a} and {b}");
            }
        }
    }
}
