//! Layout changes nothing: every layout computes the losses, gradient norms, gradients and weights
//! of one rank, and a layout that runs twice gives the same bits.

use crate::agreement::{
    TIMEOUT, Trace, VOCAB, assert_same, distance, sigmoid, softmax, trace_of, trace_of_biased,
    trainer_on, values, write_data,
};
use parallel::run_on_threads;
use serde_json::{Value, json};
use std::path::Path;
use trainer::config::{self, Config};

const STEPS: u64 = 20;

fn config(folder: &Path, parallel: &Value, micro_batch: usize, moe: &Value) -> Config {
    let mut parallel = parallel.clone();
    parallel["bucket_mib"] = json!(1);
    let config = json!({
        "run": {"dir": folder.join("run"), "device": "cpu", "seed": 5},
        "parallel": parallel,
        "model": {"vocab_size": VOCAB, "hidden": 32, "layers": 3, "heads": 4, "kv_heads": 2,
        "ffn": 48, "dense_layers": 1,
                  "moe": moe, "init_std": 0.1},
        "data": {
            "train": [{"path": folder.join("tokens")}],
            "validation": [
                {"path": folder.join("tokens"), "weight": 2},
                {"path": folder.join("others"), "weight": 1},
            ],
            "sequence_length": 16,
        },
        // No multiple of the microbatches of any layout.
        "validation": {"every": 1000, "sequences": 7},
        "train": {"steps": STEPS, "global_batch": 8, "micro_batch": micro_batch, "grad_clip": 0.5},
        // A large eps: AdamW's first steps would otherwise turn the sign of rounding noise into a
        // step.
        "optimizer": {"eps": 1e-4},
        "schedule": {"constant": {"lr": 3e-3}},
        "checkpoint": {"every": 0},
    });
    serde_json::from_value(config).unwrap()
}

/// Layouts with the given number of expert ranks.
fn experts(ranks: usize) -> Value {
    json!({"expert": ranks})
}

fn trace(folder: &Path, ranks: usize, parallel: &Value, micro_batch: usize, moe: &Value) -> Trace {
    trace_of(ranks, config(folder, parallel, micro_batch, moe))
}

fn layouts_agree(moe: &Value) {
    let folder = tempfile::tempdir().unwrap();
    write_data(folder.path());
    let single = trace(folder.path(), 1, &experts(1), 2, moe);
    assert!(
        single.steps[STEPS as usize - 1][0] < single.steps[0][0] - 0.1,
        "it learns: {:?}",
        single.steps
    );
    let layouts = [
        (2, experts(1)),
        (2, experts(2)),
        (4, experts(2)),
        (4, experts(4)),
        (2, json!({"pipeline": 2})),
        (3, json!({"pipeline": 3, "schedule": "zb-h1"})),
        (4, json!({"pipeline": 2, "expert": 2, "schedule": "gpipe"})),
    ];
    for (ranks, parallel) in layouts {
        let ours = trace(folder.path(), ranks, &parallel, 2, moe);
        assert_same(&format!("{ranks} ranks, {parallel}"), &ours, &single);
    }
}

#[test]
fn softmax_routing_balanced_by_sequence() {
    layouts_agree(&softmax("sequence"));
}

#[test]
fn softmax_routing_balanced_by_microbatch() {
    layouts_agree(&softmax("microbatch"));
}

#[test]
fn sigmoid_routing_with_bias_balanced_over_the_batch() {
    layouts_agree(&sigmoid("batch"));
}

/// A model whose sizes do not divide: 5 layers, 3 key heads for 6 heads, a vocabulary of 61.
fn odd(folder: &Path, parallel: &Value, micro_batch: usize, tied: bool) -> Config {
    let mut config = config(folder, parallel, micro_batch, &softmax("sequence"));
    let model = &mut config.model;
    (model.layers, model.heads, model.kv_heads, model.head_dim) = (5, 6, Some(3), Some(6));
    (model.tie_embeddings, model.vocab_size) = (tied, VOCAB + 3);
    (config.train.steps, config.data.sequence_length) = (5, 24);
    config
}

#[test]
fn every_schedule_and_every_vocabulary_layout() {
    let folder = tempfile::tempdir().unwrap();
    write_data(folder.path());
    for tied in [false, true] {
        let single = trace_of(1, odd(folder.path(), &experts(1), 1, tied));
        let mut layouts = vec![
            (
                3,
                json!({"pipeline": 3, "schedule": "1f1b", "stage_layers": [1, 4, 0]}),
            ),
            (
                4,
                json!({"pipeline": 2, "schedule": "v-half", "vocabulary": "vocab-2", "expert": 2}),
            ),
            (
                4,
                json!({"pipeline": 4, "schedule": "interleaved", "vocabulary": "vocab-1"}),
            ),
        ];
        for schedule in [
            "gpipe",
            "1f1b",
            "interleaved",
            "zb-h1",
            "zb-v",
            "v-half",
            "v-min",
            "dualpipe-v",
        ] {
            for vocabulary in [
                "baseline",
                "redis",
                "naive",
                "interlaced",
                "vocab-1",
                "vocab-2",
            ] {
                layouts.push((
                    2,
                    json!({"pipeline": 2, "schedule": schedule, "vocabulary": vocabulary}),
                ));
            }
        }
        for (ranks, parallel) in layouts {
            let ours = trace_of(ranks, odd(folder.path(), &parallel, 1, tied));
            assert_same(
                &format!("{ranks} ranks, tied {tied}, {parallel}"),
                &ours,
                &single,
            );
        }
    }
}

#[test]
fn every_axis_alone_and_some_together() {
    let folder = tempfile::tempdir().unwrap();
    write_data(folder.path());
    let single = trace_of(1, odd(folder.path(), &experts(1), 2, true));
    let layouts = [
        (2, json!({"tensor": 2})),
        (2, json!({"tensor": 2, "tensor_chunks": 3})),
        (2, json!({"context": 2})),
        (2, json!({"context": 2, "context_attention": "ulysses"})),
        (2, json!({"expert_tensor": 2})),
        (4, json!({"expert": 2, "expert_tensor": 2, "tensor": 2})),
        (2, json!({"zero": 1})),
        (2, json!({"zero": 2})),
        (2, json!({"zero": 3})),
        (4, json!({"zero": 3, "zero_group_size": 2, "expert": 2})),
        (1, json!({"recompute": {"layers": "all"}})),
        (
            2,
            json!({"expert": 2, "recompute": {"layers": [1], "parts": ["norm", "attention",
                "dispatch", "experts"]}}),
        ),
        (
            4,
            json!({"pipeline": 2, "tensor": 2, "vocabulary": "vocab-2", "schedule": "zb-h1",
                "expert": 2}),
        ),
        (
            4,
            json!({"pipeline": 2, "tensor": 2, "vocabulary": "redis"}),
        ),
        (
            8,
            json!({"pipeline": 2, "context": 2, "zero": 3, "vocabulary": "vocab-1",
                "recompute": {"layers": "all"}}),
        ),
    ];
    for (ranks, parallel) in layouts {
        let ours = trace_of(ranks, odd(folder.path(), &parallel, 2, true));
        assert_same(&format!("{ranks} ranks, {parallel}"), &ours, &single);
    }
}

/// Biases the router: most tokens select experts 1 and 2 of 12.
fn biased(trainer: &trainer::Trainer) {
    for (_, _, bias) in trainer.model().biases() {
        let _ = bias.narrow(0, 1, 2).fill_(0.5);
    }
}

fn skewed(folder: &Path, parallel: &Value, dispatch: &str) -> Config {
    let mut moe = sigmoid("sequence");
    (moe["experts"], moe["bias_update_rate"]) = (json!(12), json!(1e-6));
    moe["dispatch"] = json!(dispatch);
    if dispatch.contains("least_loaded") {
        moe["least_loaded"] = json!({"min_tokens": 1});
    }
    let mut config = config(folder, parallel, 1, &moe);
    config.train.steps = 6;
    config
}

#[test]
fn expert_lending_and_hierarchical_dispatch_change_nothing() {
    let folder = tempfile::tempdir().unwrap();
    write_data(folder.path());
    let single = trace_of_biased(1, skewed(folder.path(), &experts(1), "standard"), biased);
    let layouts = [
        (2, json!({"expert": 2})),
        (4, json!({"expert": 4, "ranks_per_node": 2})),
        (4, json!({"expert": 2, "zero": 3, "ranks_per_node": 1})),
        (
            4,
            json!({"tensor": 2, "expert": 2, "expert_tensor": 2, "zero": 2}),
        ),
        (
            4,
            json!({"pipeline": 2, "expert": 2, "schedule": "zb-h1", "vocabulary": "vocab-2",
                "expert_chunks": 2}),
        ),
        (
            4,
            json!({"expert": 4, "ranks_per_node": 2, "recompute": {"layers": "all"},
                "expert_chunks": 3}),
        ),
        (
            2,
            json!({"expert": 2, "recompute": {"parts": ["norm", "dispatch", "experts"]}}),
        ),
        (
            4,
            json!({"context": 2, "tensor": 2, "expert": 4, "zero": 1, "ranks_per_node": 2}),
        ),
    ];
    for (ranks, parallel) in layouts {
        let nodes = parallel.get("ranks_per_node").is_some();
        for dispatch in ["least_loaded", "hierarchical", "hierarchical_least_loaded"] {
            if dispatch.starts_with("hierarchical") && !nodes {
                continue;
            }
            let ours = trace_of_biased(ranks, skewed(folder.path(), &parallel, dispatch), biased);
            assert_same(
                &format!("{ranks} ranks, {dispatch}, {parallel}"),
                &ours,
                &single,
            );
            assert_eq!(
                ours.lent_tokens > 0,
                dispatch.contains("least_loaded"),
                "{dispatch}, {parallel}"
            );
        }
    }
    let twice = || {
        trace_of_biased(
            4,
            skewed(folder.path(), &experts(4), "least_loaded"),
            biased,
        )
    };
    assert_eq!(twice(), twice());
}

#[test]
fn experts_that_move_change_nothing() {
    let folder = tempfile::tempdir().unwrap();
    write_data(folder.path());
    let single = trace_of_biased(1, skewed(folder.path(), &experts(1), "standard"), biased);
    let layouts = [
        (2, json!({"expert": 2}), "standard"),
        (4, json!({"expert": 2, "zero": 3}), "standard"),
        (
            4,
            json!({"expert": 2, "zero": 2, "zero_group_size": 2}),
            "least_loaded",
        ),
        (
            4,
            json!({"tensor": 2, "expert": 2, "expert_tensor": 2, "zero": 1}),
            "standard",
        ),
        (
            4,
            json!({"pipeline": 2, "expert": 2, "schedule": "zb-h1"}),
            "least_loaded",
        ),
    ];
    for (ranks, parallel, dispatch) in layouts {
        let mut config = skewed(folder.path(), &parallel, dispatch);
        config.model.moe.as_mut().unwrap().placement =
            Some(serde_json::from_value(json!({"every": 2})).unwrap());
        let ours = trace_of_biased(ranks, config, biased);
        assert_same(
            &format!("{ranks} ranks, {dispatch}, {parallel}"),
            &ours,
            &single,
        );
        assert!(ours.moved > 0, "{parallel}");
    }
}

#[test]
fn a_run_whose_experts_move_resumes_bit_for_bit() {
    tch::set_num_threads(1);
    let folder = tempfile::tempdir().unwrap();
    write_data(folder.path());
    let mut config = skewed(
        folder.path(),
        &json!({"expert": 2, "zero": 1}),
        "least_loaded",
    );
    let moe = config.model.moe.as_mut().unwrap();
    (moe.placement, moe.least_loaded) = (
        Some(serde_json::from_value(json!({"every": 2})).unwrap()),
        config::LeastLoadedConfig::default(),
    );
    let run = |config: Config, resumes: bool| {
        run_on_threads(4, TIMEOUT, move |world| {
            let mut trainer = trainer_on(world, config.clone());
            biased(&trainer);
            let resumed = trainer.resume(&mut |warning| panic!("{warning}")).unwrap();
            assert_eq!(resumed == trainer::ResumeSource::Checkpoint, resumes);
            let steps = |trainer: &mut trainer::Trainer, count| {
                (0..count)
                    .map(|_| trainer.train_step(false).unwrap().0.loss)
                    .collect::<Vec<_>>()
            };
            if !resumes {
                steps(&mut trainer, 3);
                trainer.save().unwrap();
            }
            steps(&mut trainer, 3)
        })
    };
    assert_eq!(run(config.clone(), false), run(config, true));
}

#[test]
fn a_run_that_lends_experts_leaves_the_checkpoint_of_one_that_does_not() {
    tch::set_num_threads(1);
    let folder = tempfile::tempdir().unwrap();
    write_data(folder.path());
    let saved = |dispatch: &str| {
        let mut config = skewed(folder.path(), &json!({"expert": 4, "zero": 1}), dispatch);
        config.run.dir = folder.path().join(dispatch);
        let paths = run_on_threads(4, TIMEOUT, move |world| {
            let mut trainer = trainer_on(world, config.clone());
            biased(&trainer);
            for _ in 0..6 {
                trainer.train_step(false).unwrap();
            }
            trainer.save().unwrap()
        });
        checkpoint::Checkpoint::open(&paths[0]).unwrap()
    };
    let mut standard = saved("standard");
    let mut ours = saved("least_loaded");
    let tensors: Vec<_> = standard
        .manifest()
        .tensors
        .iter()
        .map(|(name, t)| (name.clone(), t.shape.clone()))
        .collect();
    assert!(
        tensors
            .iter()
            .any(|(name, _)| name.starts_with("exp_avg_sq/layers.1.moe.experts.1."))
    );
    for (name, shape) in tensors
        .iter()
        .filter(|(name, _)| !name.starts_with("generator"))
    {
        let slice = checkpoint::TensorSlice::whole(name.clone(), shape);
        let a = ours.tensor(&slice).unwrap();
        let b = standard.tensor(&slice).unwrap();
        let far = distance(&values(&a), &values(&b));
        assert!(far <= 1e-5, "{name} is {far} away");
    }
    assert_eq!(
        ours.manifest().tensors.len(),
        standard.manifest().tensors.len()
    );
}

#[test]
fn accumulation_in_place_of_data() {
    let folder = tempfile::tempdir().unwrap();
    write_data(folder.path());
    for moe in [softmax("sequence"), softmax("batch")] {
        let whole = trace(folder.path(), 1, &experts(1), 8, &moe);
        for micro_batch in [1, 4] {
            let ours = trace(folder.path(), 1, &experts(1), micro_batch, &moe);
            assert_same(&format!("microbatches of {micro_batch}"), &ours, &whole);
        }
        assert_same(
            "2 ranks with microbatches of 4",
            &trace(folder.path(), 2, &experts(2), 4, &moe),
            &whole,
        );
    }
}

#[test]
fn the_same_layout_twice_is_the_same_to_the_bit() {
    let folder = tempfile::tempdir().unwrap();
    write_data(folder.path());
    let run = || trace(folder.path(), 4, &experts(2), 1, &softmax("sequence"));
    assert_eq!(run(), run());
}

#[test]
fn a_checkpoint_of_four_ranks_resumes_in_any_layout() {
    tch::set_num_threads(1);
    let folder = tempfile::tempdir().unwrap();
    write_data(folder.path());
    let moe = sigmoid("sequence");
    let of = |expert| config(folder.path(), &experts(expert), 2, &moe);
    let four = of(2);
    let unbroken = run_on_threads(4, TIMEOUT, move |world| {
        let mut trainer = trainer_on(world, four.clone());
        for _ in 0..5 {
            trainer.train_step(false).unwrap();
        }
        trainer.save().unwrap();
        (0..5)
            .map(|_| trainer.train_step(false).unwrap().0.loss)
            .collect::<Vec<_>>()
    });
    for (ranks, expert) in [(4, 2), (4, 4), (2, 2), (2, 1), (1, 1)] {
        let other = of(expert);
        let resumed = run_on_threads(ranks, TIMEOUT, move |world| {
            let mut trainer = trainer_on(world, other.clone());
            let mut warnings = Vec::new();
            let resumed = trainer
                .resume(&mut |warning| warnings.push(warning.to_string()))
                .unwrap();
            assert_eq!(resumed, trainer::ResumeSource::Checkpoint);
            assert_eq!((trainer.step(), warnings), (5, vec![]));
            (0..5)
                .map(|_| trainer.train_step(false).unwrap().0.loss)
                .collect::<Vec<_>>()
        });
        for (a, b) in resumed[0].iter().zip(&unbroken[0]) {
            assert!((a - b).abs() <= 1e-5 * b, "{ranks} ranks: {a} and {b}");
            if (ranks, expert) == (4, 2) {
                assert_eq!(a, b, "the same layout resumes to the bit");
            }
        }
    }
}

#[test]
fn ranks_and_experts_without_tokens_train_on() {
    // Far more experts than a microbatch of 16 tokens can use. Routing weights are not normalized,
    // because the single weight would always be 1.
    let folder = tempfile::tempdir().unwrap();
    write_data(folder.path());
    let moe = json!({"experts": 64, "top_k": 1, "ffn": 8, "load_balance": 0.0,
        "router": {"normalize": false}});
    let single = trace(folder.path(), 1, &experts(1), 1, &moe);
    let unused = single
        .first_gradients
        .iter()
        .filter(|(name, g)| name.contains("experts") && g.iter().all(|&g| g == 0.0));
    assert!(
        unused.count() > 2,
        "some experts are without tokens over the whole batch"
    );
    assert_same(
        "experts over 4",
        &trace(folder.path(), 4, &experts(4), 1, &moe),
        &single,
    );
}

#[test]
fn bf16_keeps_fp32_masters_and_learns() {
    tch::set_num_threads(1);
    let folder = tempfile::tempdir().unwrap();
    write_data(folder.path());
    let mut bf16 = config(folder.path(), &experts(2), 2, &softmax("sequence"));
    bf16.train.dtype = config::Dtype::Bf16;
    let losses = run_on_threads(2, TIMEOUT, move |world| {
        let mut trainer = trainer_on(world, bf16.clone());
        let losses: Vec<f64> = (0..STEPS)
            .map(|_| trainer.train_step(false).unwrap().0.loss)
            .collect();
        for parameter in trainer.model().parameters.iter() {
            assert_eq!(parameter.master.kind(), tch::Kind::Float);
            let master = parameter
                .master
                .to_kind(tch::Kind::BFloat16)
                .view(parameter.weight.shape());
            assert_eq!(parameter.weight.value(), master);
        }
        losses
    });
    let fp32 = trace(folder.path(), 1, &experts(1), 2, &softmax("sequence"));
    for (bf16, fp32) in losses[0].iter().zip(&fp32.steps) {
        assert!(
            (bf16 - fp32[0]).abs() < 0.02 * fp32[0],
            "{bf16} and {}",
            fp32[0]
        );
    }
}
