//! Optimizers other than AdamW: every layout computes the weights of one rank, a resume gives the
//! same bits, and a checkpoint of any layout resumes in any other.

use crate::agreement::{
    TIMEOUT, VOCAB, assert_same, assert_within, sigmoid, softmax, trace_of, trace_of_biased,
    trainer_on, write_data,
};
use checkpoint::{Checkpoint, TensorSlice};
use parallel::run_on_threads;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tch::Kind;
use trainer::{ResumeSource, Trainer, config::Config};

fn config(folder: &Path, parallel: &Value, moe: &Value, optimizer: &Value) -> Config {
    let mut parallel = parallel.clone();
    parallel["bucket_mib"] = json!(1);
    let mut optimizer = optimizer.clone();
    optimizer["eps"] = json!(1e-4);
    let config = json!({
        "run": {"dir": folder.join("run"), "device": "cpu", "seed": 5},
        "parallel": parallel,
        "model": {"vocab_size": VOCAB + 3, "hidden": 24, "layers": 4, "heads": 6, "kv_heads": 2,
                  "head_dim": 4, "ffn": 48, "dense_layers": 1, "moe": moe, "init_std": 0.1,
                  "tie_embeddings": true},
        "data": {"train": [{"path": folder.join("tokens")}], "sequence_length": 24},
        "train": {"steps": 4, "global_batch": 8, "micro_batch": 1, "grad_clip": 0.5},
        "optimizer": optimizer,
        "schedule": {"constant": {"lr": 3e-3}},
        "checkpoint": {"every": 0},
    });
    serde_json::from_value(config).unwrap()
}

/// Muon and AdamW with state in bf16.
fn rounded() -> Value {
    json!({"state_dtype": "bf16", "groups": [{"muon": {}}]})
}

fn experts(moe: Value) -> Value {
    let mut moe = moe;
    moe["experts"] = json!(12);
    moe["ffn"] = json!(24);
    moe
}

fn muon() -> Value {
    json!({"groups": [{"muon": {}}]})
}

/// Muon for the router too, with a scale by shape of its own, and SGD for vectors.
fn mixed() -> Value {
    json!({
        "groups": [
            {"roles": ["router"], "lr_scale": 2, "muon": {"adjust_lr": "original",
                                                          "nesterov": false}},
            {"muon": {}},
            {"roles": ["norm"], "sgd": {"nesterov": true}},
        ],
    })
}

/// Muon, and QK-clip with a threshold.
fn clipped(threshold: f64) -> Value {
    json!({"groups": [{"muon": {}}], "qk_clip": {"threshold": threshold}})
}

/// Layouts by their number of ranks.
fn layouts() -> Vec<(usize, Value)> {
    vec![
        (2, json!({})),
        (2, json!({"tensor": 2})),
        (2, json!({"context": 2})),
        (2, json!({"expert": 2})),
        (2, json!({"expert_tensor": 2})),
        (2, json!({"zero": 1})),
        (2, json!({"zero": 2})),
        (4, json!({"zero": 3})),
        (4, json!({"zero": 3, "zero_group_size": 2, "expert": 2})),
        (2, json!({"pipeline": 2})),
        (
            4,
            json!({"expert": 2, "expert_tensor": 2, "tensor": 2, "zero": 1}),
        ),
        (
            4,
            json!({"pipeline": 2, "tensor": 2, "vocabulary": "vocab-2", "schedule": "zb-h1",
                   "zero": 3}),
        ),
        (
            8,
            json!({"pipeline": 2, "context": 2, "zero": 2, "expert_tensor": 2}),
        ),
    ]
}

#[test]
fn every_layout_orthogonalizes_whole_matrices() {
    let folder = tempfile::tempdir().unwrap();
    write_data(folder.path());
    let moe = experts(softmax("sequence"));
    let layouts = layouts();
    for optimizer in [muon(), mixed()] {
        let single = trace_of(1, config(folder.path(), &json!({}), &moe, &optimizer));
        let first = single.steps[0][0];
        assert!(single.steps[3][0] < first, "it learns: {:?}", single.steps);
        for (ranks, parallel) in &layouts {
            let ours = trace_of(*ranks, config(folder.path(), parallel, &moe, &optimizer));
            assert_same(&format!("{ranks} ranks, {parallel}"), &ours, &single);
        }
    }
    // Rounding noise may change the direction in which an element of the momentum is rounded, and
    // orthogonalization amplifies that in experts with few tokens.
    let single = trace_of(1, config(folder.path(), &json!({}), &moe, &rounded()));
    for (ranks, parallel) in layouts.iter().take(7) {
        let ours = trace_of(*ranks, config(folder.path(), parallel, &moe, &rounded()));
        assert_within(&format!("{ranks} ranks, {parallel}"), &ours, &single, 2e-3);
    }
}

#[test]
fn every_layout_clips_the_same_heads() {
    let folder = tempfile::tempdir().unwrap();
    write_data(folder.path());
    let moe = experts(softmax("sequence"));
    let config = |parallel: &Value| config(folder.path(), parallel, &moe, &clipped(0.2));
    let single = trace_of(1, config(&json!({})));
    let heads = 4 * 4 * 6;
    assert!(
        (1..heads).contains(&single.clipped_heads),
        "{}",
        single.clipped_heads
    );
    let mut layouts = layouts();
    // Three ranks do not divide the two key heads.
    layouts.push((3, json!({"tensor": 3, "recompute": {"layers": "all"}})));
    layouts.push((2, json!({"context": 2, "context_attention": "ulysses"})));
    for (ranks, parallel) in &layouts {
        let ours = trace_of(*ranks, config(parallel));
        assert_same(&format!("{ranks} ranks, {parallel}"), &ours, &single);
        assert_eq!(ours.clipped_heads, single.clipped_heads, "{parallel}");
        for (ours, single) in ours.largest_logits.iter().zip(&single.largest_logits) {
            assert!((ours - single).abs() <= 1e-5 * single, "{parallel}");
        }
    }
}

#[test]
fn a_head_is_clipped_after_its_update() {
    let folder = tempfile::tempdir().unwrap();
    write_data(folder.path());
    let moe = experts(softmax("sequence"));
    let trace = |optimizer: &Value| {
        let mut config = config(folder.path(), &json!({}), &moe, optimizer);
        config.model.layers = 1;
        config.model.dense_layers = 0;
        config.model.heads = 1;
        config.model.kv_heads = Some(1);
        config.train.steps = 1;
        trace_of(1, config)
    };
    let plain = trace(&muon());
    assert!(plain.largest_logits.is_empty());
    let unclipped = trace(&clipped(1e3));
    assert_eq!(
        (&unclipped.steps, &unclipped.weights),
        (&plain.steps, &plain.weights)
    );
    let threshold = 0.1;
    let ours = trace(&clipped(threshold));
    assert_eq!(ours.largest_logits, unclipped.largest_logits);
    let factor = (threshold / ours.largest_logits[0]).sqrt();
    assert!(factor < 0.9, "{factor}");
    for (name, values) in &ours.weights {
        let scaled = ["attention.query", "attention.key"]
            .iter()
            .any(|part| name.ends_with(part));
        let factor = if scaled { factor } else { 1.0 };
        for (ours, plain) in values.iter().zip(&plain.weights[name]) {
            let expected = f64::from(*plain) * factor;
            assert!(
                (f64::from(*ours) - expected).abs() <= 1e-6 * expected.abs(),
                "{name}"
            );
        }
    }
}

/// Biases the router: most tokens select experts 1 and 2 of 12.
fn biased(trainer: &Trainer) {
    for (_, _, bias) in trainer.model().biases() {
        let _ = bias.narrow(0, 1, 2).fill_(0.5);
    }
}

/// Experts that move every other step.
fn moving(folder: &Path, parallel: &Value, optimizer: &Value) -> Config {
    let mut moe = experts(sigmoid("sequence"));
    moe["bias_update_rate"] = json!(1e-6);
    moe["placement"] = json!({"every": 2});
    config(folder, parallel, &moe, optimizer)
}

#[test]
fn momentum_moves_with_its_expert() {
    let folder = tempfile::tempdir().unwrap();
    write_data(folder.path());
    for optimizer in [muon(), mixed()] {
        let single = moving(folder.path(), &json!({}), &optimizer);
        let single = trace_of_biased(1, single, biased);
        for (ranks, parallel) in [
            (2, json!({"expert": 2})),
            (4, json!({"expert": 2, "zero": 3})),
            (4, json!({"expert": 2, "expert_tensor": 2, "zero": 1})),
        ] {
            let config = moving(folder.path(), &parallel, &optimizer);
            let ours = trace_of_biased(ranks, config, biased);
            assert_same(&format!("{ranks} ranks, {parallel}"), &ours, &single);
            assert!(ours.moved > 0, "{parallel}");
        }
    }
}

/// Trains `before` steps, saves, and trains two more. Returns their losses and the checkpoint.
fn train_and_save(ranks: usize, config: &Config) -> (Vec<f64>, PathBuf) {
    let config = config.clone();
    let mut results = run_on_threads(ranks, TIMEOUT, move |world| {
        let mut trainer = trainer_on(world, config.clone());
        losses(&mut trainer);
        let path = trainer.save().unwrap();
        (losses(&mut trainer), path)
    });
    results.swap_remove(0)
}

fn losses(trainer: &mut Trainer) -> Vec<f64> {
    let step = |_| trainer.train_step(false).unwrap().0.loss;
    (0..2).map(step).collect()
}

/// Resumes and trains two steps. Returns their losses and the notes of the resume.
fn resume(ranks: usize, config: &Config, accepted: &[&str]) -> Result<(Vec<f64>, String), String> {
    let config = config.clone();
    let accepted: Vec<String> = accepted.iter().map(|key| key.to_string()).collect();
    let mut results = run_on_threads(ranks, TIMEOUT, move |world| {
        let mut trainer = trainer_on(world, config.clone());
        trainer.accept_changes(accepted.clone());
        let source = trainer.resume(&mut |warning| panic!("{warning}"));
        assert_eq!(source.map_err(|e| e.to_string())?, ResumeSource::Checkpoint);
        let notes = trainer.resume_report().notes.join("; ");
        Ok((losses(&mut trainer), notes))
    });
    results.swap_remove(0)
}

#[test]
fn a_checkpoint_resumes_exactly_and_in_other_layouts() {
    tch::set_num_threads(1);
    let folder = tempfile::tempdir().unwrap();
    write_data(folder.path());
    let optimizers = [(clipped(0.1), 1e-5), (mixed(), 1e-5), (rounded(), 1e-3)];
    for (number, (optimizer, tolerance)) in optimizers.into_iter().enumerate() {
        let run = |parallel: Value| {
            let mut config = moving(folder.path(), &parallel, &optimizer);
            config.run.dir = folder.path().join(format!("run-{number}"));
            config
        };
        let layout = json!({"expert": 2, "tensor": 2, "zero": 2});
        let (unbroken, path) = train_and_save(4, &run(layout.clone()));
        let (resumed, _) = resume(4, &run(layout), &[]).unwrap();
        assert_eq!(resumed, unbroken);
        for (ranks, parallel) in [
            (1, json!({})),
            (2, json!({"pipeline": 2})),
            (4, json!({"expert_tensor": 4, "zero": 3})),
        ] {
            let (resumed, _) = resume(ranks, &run(parallel.clone()), &[]).unwrap();
            for (ours, reference) in resumed.iter().zip(&unbroken) {
                let far = (ours - reference).abs() / reference;
                assert!(far <= tolerance, "{parallel}: {ours} and {reference}");
            }
        }
        let checkpoint = Checkpoint::open(&path).unwrap();
        let names = checkpoint.manifest().tensors.keys();
        let of_expert = names.filter(|name| name.contains("/layers.1.moe.experts.3.down"));
        let kinds: Vec<&str> = of_expert
            .filter_map(|name| name.split('/').next())
            .collect();
        assert_eq!(kinds, ["model", "muon_momentum"]);
    }
}

#[test]
fn state_is_read_in_either_precision() {
    tch::set_num_threads(1);
    let folder = tempfile::tempdir().unwrap();
    write_data(folder.path());
    let moe = experts(softmax("sequence"));
    let of = |dtype: &str| {
        let optimizer = json!({"state_dtype": dtype});
        config(folder.path(), &json!({"zero": 1}), &moe, &optimizer)
    };
    for (from, to, kind) in [
        ("fp32", "bf16", Kind::Float),
        ("bf16", "fp32", Kind::BFloat16),
    ] {
        let (unbroken, path) = train_and_save(2, &of(from));
        let name = "exp_avg_sq/embedding".to_string();
        let mut checkpoint = Checkpoint::open(&path).unwrap();
        let shape = checkpoint.manifest().tensors[&name].shape.clone();
        let saved = checkpoint
            .tensor(&TensorSlice::whole(name, &shape))
            .unwrap();
        assert_eq!(saved.kind(), kind);
        let (resumed, _) = resume(2, &of(to), &[]).unwrap();
        // Moments in bf16 change steps by less than a hundredth.
        assert_eq!(resumed[0], unbroken[0]);
        let change = (resumed[1] - unbroken[1]).abs() / unbroken[1];
        assert!(change < 1e-3, "{change}");
        // State that was read in bf16 gives the next update exactly, whatever it is kept in.
        assert_eq!(change > 0.0, to == "bf16", "{change}");
        std::fs::remove_dir_all(folder.path().join("run")).unwrap();
    }
}

#[test]
fn other_optimizers_are_refused_unless_accepted() {
    tch::set_num_threads(1);
    let folder = tempfile::tempdir().unwrap();
    write_data(folder.path());
    let moe = experts(softmax("sequence"));
    let of = |optimizer: &Value| config(folder.path(), &json!({}), &moe, optimizer);
    let (_, _) = train_and_save(1, &of(&json!({})));
    let refusal = resume(1, &of(&muon()), &[]).unwrap_err();
    assert!(refusal.contains("optimizer.groups: "), "{refusal}");
    let (resumed, notes) = resume(1, &of(&muon()), &["optimizer.groups"]).unwrap();
    assert!(resumed.iter().all(|loss| loss.is_finite()));
    for expected in [
        "tensors of muon_momentum are missing and start at zero",
        "tensors of exp_avg_sq are no longer used",
    ] {
        assert!(notes.contains(expected), "{notes}");
    }
}

#[test]
fn state_that_began_on_a_resume_resumes_exactly() {
    tch::set_num_threads(1);
    let folder = tempfile::tempdir().unwrap();
    write_data(folder.path());
    let moe = experts(softmax("sequence"));
    let of = |optimizer: &Value| {
        let mut config = config(folder.path(), &json!({"pipeline": 2}), &moe, optimizer);
        config.train.steps = 8;
        config
    };
    train_and_save(2, &of(&muon()));
    // Moments of matrices begin after step 2, and those of norms with the run.
    let adamw = of(&json!({"groups": [{"adamw": {}}]}));
    let mut results = run_on_threads(2, TIMEOUT, move |world| {
        let mut trainer = trainer_on(world, adamw.clone());
        trainer.accept_changes(vec!["optimizer.groups".to_string()]);
        trainer.resume(&mut |warning| panic!("{warning}")).unwrap();
        losses(&mut trainer);
        let path = trainer.save().unwrap();
        (losses(&mut trainer), path)
    });
    let (unbroken, path) = results.swap_remove(0);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let starts = &checkpoint.manifest().state["state_starts"];
    assert_eq!(starts["layers.1.moe.experts.down"], json!(2), "{starts}");
    assert_eq!(starts.get("norm"), None);
    let adamw = of(&json!({"groups": [{"adamw": {}}]}));
    let (resumed, _) = resume(2, &adamw, &[]).unwrap();
    assert_eq!(resumed, unbroken);
    let mut elsewhere = adamw.clone();
    elsewhere.parallel = serde_json::from_value(json!({"tensor": 2, "zero": 1})).unwrap();
    let (resumed, _) = resume(2, &elsewhere, &[]).unwrap();
    for (ours, reference) in resumed.iter().zip(&unbroken) {
        assert!(
            (ours - reference).abs() <= 1e-5 * reference,
            "{ours} and {reference}"
        );
    }
}
