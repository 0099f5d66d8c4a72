//! `run.deterministic` on processors: it reaches libtorch and changes no bit.
//!
//! A program of its own, since the setting is one of the process.

use dataset::tokens::TokenWriter;
use parallel::{Cpu, World};
use serde_json::json;
use std::path::Path;
use trainer::{Trainer, config::Config};

const VOCAB: usize = 64;

fn write_data(folder: &Path) {
    let mut writer = TokenWriter::create(&folder.join("tokens"), VOCAB).unwrap();
    let tokens: Vec<u32> = (0..3000).map(|number: u32| number * number % 61).collect();
    writer.push(&tokens).unwrap();
    writer.finish().unwrap();
}

/// Returns the losses and gradient norms of a few steps.
fn steps(folder: &Path, deterministic: bool) -> Vec<[f64; 2]> {
    let config: Config = serde_json::from_value(json!({
        "run": {"dir": folder.join("run"), "deterministic": deterministic},
        "model": {"vocab_size": VOCAB, "hidden": 32, "layers": 2, "heads": 4,
            "moe": {"experts": 4, "top_k": 2, "ffn": 16}},
        "data": {"train": [{"path": folder.join("tokens")}], "sequence_length": 16},
        "train": {"steps": 4, "global_batch": 8, "micro_batch": 4},
    }))
    .unwrap();
    let mut trainer = Trainer::new(config, &World::single(), Box::new(Cpu)).unwrap();
    let mut step = || {
        let (metrics, _) = trainer.train_step(false).unwrap();
        [metrics.loss, metrics.grad_norm]
    };
    (0..4).map(|_| step()).collect()
}

#[test]
fn the_key_reaches_libtorch_and_changes_no_bit_on_processors() {
    let folder = tempfile::tempdir().unwrap();
    write_data(folder.path());
    let plain = steps(folder.path(), false);
    assert!(!torch_ext::uses_deterministic());
    let repeated = steps(folder.path(), true);
    assert!(torch_ext::uses_deterministic());
    assert_eq!(plain, repeated);
    assert!(plain.windows(2).all(|pair| pair[0] != pair[1]), "{plain:?}");
}
