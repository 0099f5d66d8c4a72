//! Documents that share a sequence: masks and positions within documents do not depend on the
//! layout, also if ranks split a document.

use crate::agreement::{TIMEOUT, assert_same, softmax, trace_of, trainer_on};
use dataset::tokens::TokenWriter;
use parallel::run_on_threads;
use serde_json::{Value, json};
use std::path::Path;
use trainer::{config::Config, sample_routing};

/// Number of different tokens. Token 0 ends documents.
const VOCAB: u32 = 32;

/// Writes documents of 1 to 30 tokens, so that sequences have several and ranks split many.
fn write_documents(folder: &Path) {
    let mut state = 1u64;
    let mut next = move |below: u64| {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 33) % below
    };
    let mut writer = TokenWriter::create(&folder.join("tokens"), VOCAB as usize).unwrap();
    for _ in 0..200 {
        let mut token = 1 + next(u64::from(VOCAB) - 1) as u32;
        let length = next(30);
        let mut document = Vec::new();
        for _ in 0..length {
            document.push(token);
            token = 1 + (token * 5 + next(3) as u32) % (VOCAB - 1);
        }
        document.push(0);
        writer.push(&document).unwrap();
    }
    writer.finish().unwrap();
}

fn config(folder: &Path, parallel: &Value, keys: &Value, data: &Value) -> Config {
    let mut model = json!({
        "vocab_size": VOCAB, "hidden": 32, "layers": 4, "heads": 4, "ffn": 48, "dense_layers": 1,
        "moe": softmax("sequence"), "init_std": 0.1,
    });
    let all_keys = model.as_object_mut().unwrap();
    all_keys.extend(keys.as_object().unwrap().clone());
    let mut all_data = json!({
        "train": [{"path": folder.join("tokens")}], "sequence_length": 24, "eod_token": 0,
    });
    let keys_of_data = all_data.as_object_mut().unwrap();
    keys_of_data.extend(data.as_object().unwrap().clone());
    let config = json!({
        "run": {"dir": folder.join("run"), "device": "cpu", "seed": 5},
        "parallel": parallel,
        "model": model,
        "data": all_data,
        "train": {"steps": 4, "global_batch": 8, "micro_batch": 2, "grad_clip": 0.5},
        // A large eps: AdamW's first steps would otherwise turn the sign of rounding noise into a
        // step.
        "optimizer": {"eps": 1e-4},
        "schedule": {"constant": {"lr": 3e-3}},
        "checkpoint": {"every": 0},
    });
    serde_json::from_value(config).unwrap()
}

/// Compares layouts with one rank, for positions with and without masks.
fn layouts_agree(keys: &Value) {
    let folder = tempfile::tempdir().unwrap();
    write_documents(folder.path());
    let trace = |ranks: usize, parallel: &Value, data: &Value| {
        trace_of(ranks, config(folder.path(), parallel, keys, data))
    };
    let layouts = [
        (2, json!({"context": 2})),
        (2, json!({"context": 2, "context_attention": "ulysses"})),
        (
            4,
            json!({"tensor": 2, "context": 2, "expert": 2,
                   "recompute": {"parts": ["norm", "attention"]}}),
        ),
        (
            4,
            json!({"pipeline": 2, "context": 2, "vocabulary": "vocab-1", "zero": 1}),
        ),
        (
            4,
            json!({"pipeline": 2, "tensor": 2, "schedule": "zb-v", "expert": 2}),
        ),
        (
            4,
            json!({"expert": 2, "zero": 3, "recompute": {"layers": "all"}}),
        ),
    ];
    let mut first_losses = Vec::new();
    for mask in [true, false] {
        let rules = |reset: bool| json!({"mask_documents": mask, "reset_positions": reset});
        let single = trace(1, &json!({}), &rules(true));
        let in_sequences = trace(1, &json!({}), &rules(false));
        if mask {
            // Rotary embedding is relative: only attention across documents sees where they begin.
            assert_same(&format!("{keys}"), &single, &in_sequences);
        } else {
            first_losses.push(single.steps[0][0]);
        }
        first_losses.push(in_sequences.steps[0][0]);
        for (ranks, parallel) in &layouts {
            let rules = rules(true);
            let ours = trace(*ranks, parallel, &rules);
            let what = format!("{ranks} ranks, {parallel}, {rules}, {keys}");
            assert_same(&what, &ours, &single);
        }
    }
    first_losses.sort_by(f64::total_cmp);
    let is_distinct = |pair: &[f64]| pair[1] - pair[0] > 1e-4;
    let mut pairs = first_losses.windows(2);
    assert!(pairs.all(is_distinct), "{first_losses:?}");
}

#[test]
fn windows_and_sinks() {
    layouts_agree(&json!({
        "kv_heads": 2,
        "attention": {"grouped": {"window": {"size": 9, "layers": {"every": 2}}, "sinks": true}},
        "rope": {
            "layers": [0, 2], "fraction": 0.5,
            "scaling": {"linear": {"factor": 2.0}},
        },
    }));
}

#[test]
fn latent_attention() {
    layouts_agree(&json!({
        "attention": {"latent": {
            "query_rank": 14, "kv_rank": 12, "nope_dim": 6, "rope_dim": 4, "value_dim": 10,
        }},
        "rope": {"scaling": {"yarn": {"factor": 4.0, "original_length": 8}}},
    }));
}

#[test]
fn a_mask_is_the_default_where_a_token_ends_documents() {
    let folder = tempfile::tempdir().unwrap();
    write_documents(folder.path());
    let of = |data: Value| trace_of(1, config(folder.path(), &json!({}), &json!({}), &data));
    let by_default = of(json!({}));
    assert_eq!(by_default, of(json!({"mask_documents": true})));
    assert_ne!(by_default, of(json!({"mask_documents": false})));
    let without_token = of(json!({"eod_token": null}));
    assert_eq!(without_token, of(json!({"mask_documents": false})));
}

/// Rank 0 reads the record for all ranks.
#[test]
fn a_recorded_token_does_as_a_given_one() {
    let folder = tempfile::tempdir().unwrap();
    write_documents(folder.path());
    let record = json!({
        "documents": 200, "bytes": 1, "train_tokens": 1, "validation_tokens": 0,
        "vocab_size": VOCAB, "unigram_entropy": 1.0, "eos": {"id": 0, "text": "</s>"},
    });
    std::fs::write(folder.path().join("dataset.json"), record.to_string()).unwrap();
    let layouts = [
        json!({"tensor": 2, "context": 2, "expert": 2}),
        json!({"pipeline": 2, "context": 2, "vocabulary": "vocab-1"}),
    ];
    for parallel in layouts {
        let trace = |token: Value| {
            let rules = json!({
                "mask_documents": true, "reset_positions": true, "eod_mask_loss": true,
                "eod_token": token,
            });
            trace_of(4, config(folder.path(), &parallel, &json!({}), &rules))
        };
        let given = trace(json!(0));
        let recorded = trace(Value::Null);
        assert_eq!(recorded.steps, given.steps, "{parallel}");
        assert_eq!(recorded.weights, given.weights, "{parallel}");
        let other = trace(json!(1));
        assert_ne!(other.steps, given.steps, "{parallel}");
    }
}

/// The sample of a router's decisions keeps documents apart as training did.
#[test]
fn routing_is_sampled_by_the_rules_of_the_run() {
    let experts = |mask: bool| {
        let folder = tempfile::tempdir().unwrap();
        write_documents(folder.path());
        let rules = json!({"mask_documents": mask});
        let mut config = config(folder.path(), &json!({}), &json!({}), &rules);
        let run = config.run.dir.clone();
        config.train.steps = 1;
        run_on_threads(1, TIMEOUT, move |world| {
            trainer_on(world, config.clone()).save().unwrap();
        });
        sample_routing(&run, 2000).unwrap().experts
    };
    assert_eq!(experts(true), experts(true));
    assert_ne!(experts(true), experts(false));
}

/// The record on other machines may be another one, or missing.
#[test]
fn only_rank_0_reads_the_record() {
    let losses = |other_records: [Option<u32>; 2]| {
        let folder = tempfile::tempdir().unwrap();
        for (rank, end) in other_records.into_iter().enumerate() {
            let own = folder.path().join(format!("rank{rank}"));
            std::fs::create_dir(&own).unwrap();
            write_documents(&own);
            let Some(end) = end else { continue };
            let record = json!({
                "documents": 200, "bytes": 1, "train_tokens": 1, "validation_tokens": 0,
                "vocab_size": VOCAB, "unigram_entropy": 1.0, "eos": {"id": end, "text": "</s>"},
            });
            std::fs::write(own.join("dataset.json"), record.to_string()).unwrap();
        }
        tch::set_num_threads(1);
        let folder = folder.path().to_path_buf();
        run_on_threads(2, TIMEOUT, move |world| {
            let own = folder.join(format!("rank{}", world.rank()));
            let rules = json!({
                "mask_documents": true, "reset_positions": true, "eod_mask_loss": true,
                "eod_token": null,
            });
            let config = config(&own, &json!({"context": 2}), &json!({}), &rules);
            let mut trainer = trainer_on(world, config);
            let step = |_| trainer.train_step(false).unwrap().0.loss;
            (0..2).map(step).collect::<Vec<f64>>()
        })
    };
    let both = losses([Some(0), Some(0)]);
    assert_eq!(both, losses([Some(0), None]));
    assert_eq!(both, losses([Some(0), Some(1)]));
    assert_ne!(both, losses([Some(1), Some(0)]));
}
