//! Tokens that do not count in the loss: those after the end of a document, and those that a mask
//! leaves out.

use crate::agreement::{
    TIMEOUT, TOKENS, VOCAB, assert_same, softmax, trace_of, trainer_on, write_data,
};
use dataset::tokens::TokenWriter;
use parallel::run_on_threads;
use serde_json::{Value, json};
use std::path::Path;
use trainer::{Progress, StepMetrics, Trainer, ValidationMetrics, config::Config};

const DOCUMENT: u32 = 12;
const FIRST_TOKENS: u32 = 65;

/// Mean loss over all tokens of a model that knows everything but the first token of a document.
fn floor() -> f64 {
    f64::from(FIRST_TOKENS).ln() / f64::from(DOCUMENT)
}

fn write(path: &Path, tokens: &[u32]) {
    let mut writer = TokenWriter::create(path, 100).unwrap();
    writer.push(tokens).unwrap();
    writer.finish().unwrap();
}

/// Writes documents that end with token 0. The first token is random; each other token follows
/// from the one before it.
fn write_documents(folder: &Path) {
    let mut state = 1u64;
    let mut token = 0;
    let next = |position: u32| {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        token = match position % DOCUMENT {
            0 => 1 + (state >> 33) as u32 % FIRST_TOKENS,
            11 => 0,
            _ => 1 + (token * 5 + 1) % FIRST_TOKENS,
        };
        token
    };
    write(
        &folder.join("tokens"),
        &(0..6000).map(next).collect::<Vec<_>>(),
    );
}

/// Returns the configuration of a small model on these documents.
fn documents(folder: &Path, eod_mask_loss: bool) -> Config {
    let source = json!([{"path": folder.join("tokens")}]);
    let config = json!({
        "run": {"dir": folder, "device": "cpu", "seed": 3},
        "model": {
            "vocab_size": 67, "hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2,
            "init_std": 0.08, "moe": {"experts": 6, "top_k": 2, "ffn": 24},
        },
        "data": {
            "train": source, "validation": source, "sequence_length": 48, "eod_token": 0,
            "eod_mask_loss": eod_mask_loss,
        },
        "train": {"steps": 200, "global_batch": 8, "micro_batch": 2},
        "optimizer": {"eps": 1e-6},
        "schedule": {"constant": {"lr": 3e-3}},
        "checkpoint": {"every": 0},
        "validation": {"every": 200, "sequences": 9, "at_start": false},
    });
    serde_json::from_value(config).unwrap()
}

/// A progress report of which only the warnings are kept.
#[derive(Default)]
struct Warnings(Vec<String>);

impl Progress for Warnings {
    fn step(&mut self, _metrics: &StepMetrics, _steps: u64) {}
    fn validation(&mut self, _metrics: &ValidationMetrics) {}
    fn note(&mut self, _message: &str) {}
    fn warn(&mut self, message: &str) {
        self.0.push(message.to_string());
    }
}

/// Runs on one rank. Returns the lines of `metrics.jsonl` and the warnings.
fn run(config: &Config) -> (Vec<Value>, Vec<String>) {
    tch::set_num_threads(1);
    let path = config.run.dir.join("metrics.jsonl");
    let config = config.clone();
    let warnings = run_on_threads(1, TIMEOUT, move |world| {
        std::fs::create_dir_all(&config.run.dir).unwrap();
        let mut warnings = Warnings::default();
        let mut trainer = trainer_on(world, config.clone());
        trainer.run(&|| false, &mut warnings).unwrap();
        warnings.0
    });
    let text = std::fs::read_to_string(path).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
    (lines.collect(), warnings.into_iter().flatten().collect())
}

#[test]
fn the_first_token_of_a_document_need_not_be_predicted() {
    let folder = tempfile::tempdir().unwrap();
    write_documents(folder.path());
    let (lines, warnings) = run(&documents(folder.path(), true));
    assert_eq!(warnings, Vec::<String>::new());
    let last = &lines[199];
    assert_eq!(last["step"], 200);
    for (line, loss) in [(last, "loss"), (&lines[200], "validation_loss")] {
        let loss = line[loss].as_f64().unwrap();
        assert!(loss < floor() / 4.0, "{line}");
    }
    // Documents begin every 12 tokens: four positions of each sequence of 48 end one.
    assert_eq!(last["counted_tokens"], 8 * 44);
    assert_eq!(lines[200]["counted_tokens"], 9 * 44);

    let folder = tempfile::tempdir().unwrap();
    write_documents(folder.path());
    let (lines, _) = run(&documents(folder.path(), false));
    let loss = lines[199]["loss"].as_f64().unwrap();
    assert!(loss > floor() * 0.95, "{loss} and {}", floor());
    assert_eq!(lines[199]["counted_tokens"], 8 * 48);
    assert_eq!(lines[200]["counted_tokens"], 9 * 48);
}

/// Returns the configuration of two steps on the data of [`write_data`] and a mask.
fn masked(folder: &Path, parallel: Value, micro_batch: usize) -> Config {
    let config = json!({
        "run": {"dir": folder.join("run"), "device": "cpu", "seed": 5},
        "parallel": parallel,
        "model": {
            "vocab_size": VOCAB, "hidden": 24, "layers": 2, "heads": 4, "init_std": 0.1,
            "moe": softmax("batch"),
        },
        "data": {
            "train": [{"path": folder.join("tokens"), "mask": folder.join("mask")}],
            "sequence_length": 24,
        },
        "train": {"steps": 2, "global_batch": 12, "micro_batch": micro_batch},
        "optimizer": {"eps": 1e-4},
        "schedule": {"constant": {"lr": 3e-3}},
        "checkpoint": {"every": 0},
    });
    serde_json::from_value(config).unwrap()
}

#[test]
fn microbatches_of_unequal_counts_add_up_to_the_batch() {
    let folder = tempfile::tempdir().unwrap();
    write_data(folder.path());
    let counts = |token: u32| u32::from(token % 48 > 24 && token % 7 < 5);
    write(
        &folder.path().join("mask"),
        &(0..TOKENS).map(counts).collect::<Vec<_>>(),
    );
    let whole = trace_of(1, masked(folder.path(), json!({}), 12));
    for size in [1, 4] {
        let parts = trace_of(1, masked(folder.path(), json!({}), size));
        assert_same(&format!("microbatches of {size}"), &parts, &whole);
    }
}

/// Writes documents of four random tokens and token 3.
fn write_short_documents(path: &Path, count: u32, seed: u64) {
    let mut state = seed;
    let next = |position: u32| {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        let token = (state >> 33) as u32 % VOCAB as u32;
        if position % 5 == 4 { 3 } else { token }
    };
    write(path, &(0..count).map(next).collect::<Vec<_>>());
}

/// Returns the configuration of [`masked`] with masked validation and documents that token 3 ends.
fn masked_by_both(folder: &Path, parallel: Value, micro_batch: usize) -> Config {
    let mut config = masked(folder, parallel, micro_batch);
    let validation = json!([
        {"path": folder.join("tokens"), "mask": folder.join("mask"), "weight": 2},
        {"path": folder.join("others"), "mask": folder.join("mask-others"), "weight": 1},
    ]);
    config.data.validation = serde_json::from_value(validation).unwrap();
    config.validation = serde_json::from_value(json!({"every": 1000, "sequences": 7})).unwrap();
    config.data.eod_token = Some(3);
    config.data.eod_mask_loss = true;
    config
}

#[test]
fn masked_labels_give_the_losses_of_one_rank_in_every_layout() {
    let folder = tempfile::tempdir().unwrap();
    write_short_documents(&folder.path().join("tokens"), TOKENS, 1);
    write_short_documents(&folder.path().join("others"), TOKENS / 8, 99);
    // Sequences have 24 tokens: some count hardly any of them, so that ranks differ.
    let counts = |token: u32| u32::from(token % 48 > 40 || token % 7 < 2);
    for (name, tokens) in [("mask", TOKENS), ("mask-others", TOKENS / 8)] {
        let mask: Vec<u32> = (0..tokens).map(counts).collect();
        write(&folder.path().join(name), &mask);
    }
    let single = trace_of(1, masked_by_both(folder.path(), json!({}), 3));
    assert_eq!(single.validation.len(), 2);
    for without in [
        |config: &mut Config| config.data.eod_mask_loss = false,
        |config: &mut Config| {
            let sources = config.data.train.iter_mut();
            for source in sources.chain(&mut config.data.validation) {
                source.mask = None;
            }
        },
    ] {
        let mut config = masked_by_both(folder.path(), json!({}), 3);
        without(&mut config);
        let other = trace_of(1, config);
        let far = (other.steps[0][0] - single.steps[0][0]).abs();
        assert!(far > 1e-4, "the labels of training differ: {far}");
        for (source, loss) in &single.validation {
            let far = (other.validation[source] - loss).abs();
            assert!(far > 1e-4, "the labels of {source} differ: {far}");
        }
    }
    for parallel in [
        json!({"data": 4}),
        json!({"data": 2, "tensor": 2}),
        json!({"expert": 2, "zero": 3}),
        json!({"context": 2, "expert": 2}),
        json!({"context": 4, "context_attention": "ulysses"}),
        json!({"pipeline": 2, "context": 2, "vocabulary": "vocab-1"}),
        json!({"pipeline": 2, "data": 2, "vocabulary": "naive"}),
        json!({"pipeline": 2, "tensor": 2, "schedule": "zb-h1", "vocabulary": "vocab-2"}),
    ] {
        let ours = trace_of(4, masked_by_both(folder.path(), parallel.clone(), 3));
        assert_same(&parallel.to_string(), &ours, &single);
    }
}

#[test]
fn a_batch_without_counted_tokens_has_loss_0() {
    let folder = tempfile::tempdir().unwrap();
    write_data(folder.path());
    write(&folder.path().join("mask"), &[0; TOKENS as usize]);
    let single = trace_of(1, masked(folder.path(), json!({}), 2));
    for [loss, load_balance, _, grad_norm] in &single.steps {
        assert_eq!(*loss, 0.0);
        // Every token is routed, so that the load is still balanced.
        assert!(*load_balance > 0.9 && grad_norm.is_finite() && *grad_norm > 0.0);
    }
    for parallel in [
        json!({"data": 2, "tensor": 2}),
        json!({"pipeline": 2, "context": 2, "vocabulary": "vocab-1"}),
        json!({"pipeline": 2, "data": 2, "vocabulary": "naive"}),
    ] {
        let ours = trace_of(4, masked(folder.path(), parallel.clone(), 2));
        assert_same(&parallel.to_string(), &ours, &single);
    }
    let (lines, warnings) = run(&masked(folder.path(), json!({}), 2));
    assert_eq!(lines[1]["counted_tokens"], 0);
    assert_eq!(warnings.len(), 2);
    assert!(
        warnings[0].contains("no token of step 1 counts"),
        "{warnings:?}"
    );
}

#[test]
fn validation_without_counted_tokens_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    write_data(folder.path());
    write(&folder.path().join("mask"), &[0; TOKENS as usize]);
    let mut config = masked(folder.path(), json!({}), 2);
    config.data.validation.clone_from(&config.data.train);
    config.validation = serde_json::from_value(json!({"every": 1, "sequences": 3})).unwrap();
    let messages = run_on_threads(1, TIMEOUT, move |world| {
        let opened = Trainer::new(config.clone(), world, Box::new(parallel::Cpu));
        opened.err().unwrap().to_string()
    });
    let expected = "no token of the 3 validation sequences counts";
    assert!(messages[0].contains(expected), "{messages:?}");
}
