//! A resume with a changed configuration: every key has the effect that its declaration says.

use crate::{
    agreement::{TIMEOUT, VOCAB, trainer_on, write_data},
    fixture::{Experiment, finish, text},
};
use parallel::run_on_threads;
use serde_json::{Value, json};
use std::{collections::BTreeMap, path::Path};
use trainer::{ResumeReport, ResumeSource, config::Config};

const STEPS_BEFORE: u64 = 2;
const STEPS_AFTER: u64 = 2;

/// A key, another valid value, and changes that this value needs.
struct Change {
    key: &'static str,
    value: Value,
    with: Vec<(&'static str, Value)>,
}

fn change(key: &'static str, value: Value) -> Change {
    Change {
        key,
        value,
        with: Vec::new(),
    }
}

impl Change {
    fn with(mut self, key: &'static str, value: Value) -> Change {
        self.with.push((key, value));
        self
    }

    /// Applies the change, and what it needs.
    fn apply(&self, config: &mut Value) {
        for (key, value) in &self.with {
            set(config, key, value.clone());
        }
        set(config, self.key, self.value.clone());
    }

    /// Applies only what the change needs.
    fn prepare(&self, config: &mut Value) {
        for (key, value) in &self.with {
            set(config, key, value.clone());
        }
    }
}

fn set(config: &mut Value, key: &str, value: Value) {
    let mut target = config;
    for part in key.split('.') {
        target = &mut target[part];
    }
    *target = value;
}

/// A configuration in which every key can be changed alone.
fn base(folder: &Path) -> Value {
    json!({
        "run": {"dir": folder.join("run"), "device": "cpu"},
        "parallel": {"expert": 2},
        "model": {
            "vocab_size": VOCAB,
            "hidden": 32,
            "layers": 3,
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 8,
            "ffn": 48,
            "dense_layers": 1,
            "init_std": 0.08,
            "mup": {"width": 1.0},
            "moe": {
                "experts": 4,
                "top_k": 2,
                "ffn": 32,
                "shared_experts": 1,
                "router": {"groups": 2, "top_groups": 2},
                "dispatch": "least_loaded",
                "least_loaded": {"min_tokens": 4},
                "placement": {"every": 100},
            },
        },
        "data": {
            "train": [{"path": folder.join("tokens")}],
            "validation": [{"path": folder.join("tokens")}],
            "sequence_length": 24,
        },
        "train": {"steps": STEPS_BEFORE + STEPS_AFTER, "global_batch": 8, "micro_batch": 2},
        "optimizer": {"eps": 1e-6},
        "schedule": {"constant": {"lr": 3e-3}},
        "checkpoint": {"every": 0},
        "validation": {"every": 100, "sequences": 2},
    })
}

fn model_changes() -> Vec<Change> {
    vec![
        change("model.from", json!("another-folder")),
        change("model.vocab_size", json!(VOCAB + 8)),
        change("model.hidden", json!(48)),
        change("model.layers", json!(2)),
        change("model.heads", json!(8)),
        change("model.kv_heads", json!(4)),
        change("model.head_dim", json!(16)),
        change("model.ffn", json!(64)),
        change("model.dense_layers", json!(0)),
        change("model.moe_every", json!(2)),
        change("model.rope_theta", json!(20000)),
        change("model.rope.fraction", json!(0.5)),
        change("model.rope.scaling", json!({"linear": {"factor": 2.0}})),
        change("model.rope.layers", json!([0, 2])),
        change("model.norm_eps", json!(1e-6)),
        change("model.norm.placement", json!("sandwich")),
        change("model.norm.zero_centered", json!(true)),
        change("model.qk_norm", json!("head")),
        change("model.attention", json!({"grouped": {"sinks": true}})),
        change("model.tie_embeddings", json!(true)),
        change("model.init_std", json!(0.03)),
        change("model.mup.width", json!(2)),
        change("model.mup.embedding", json!(2)),
        change("model.mup.residual", json!(0.5)),
        change("model.multipliers.embedding", json!(2)),
        change("model.multipliers.residual", json!(0.5)),
        change("model.multipliers.attention", json!(0.3)),
        change("model.multipliers.logits", json!(0.5)),
    ]
}

fn moe_changes() -> Vec<Change> {
    vec![
        change("model.moe.experts", json!(8)),
        change("model.moe.top_k", json!(3)),
        change("model.moe.ffn", json!(48)),
        change("model.moe.layers", json!([0, 2])).with("model.dense_layers", json!(0)),
        change("model.moe.shared_experts", json!(0)),
        change("model.moe.shared_ffn", json!(40)).with("model.moe.shared_experts", json!(0)),
        change("model.moe.shared_gate", json!(true)),
        change("model.moe.activation", json!({"clamped_glu": {}})),
        change("model.moe.expert_bias", json!(true)),
        change("model.moe.router.score", json!("sigmoid")),
        change("model.moe.router.normalize", json!(false)),
        change("model.moe.router.scale", json!(2)),
        change("model.moe.router.groups", json!(4)),
        change("model.moe.router.top_groups", json!(1)),
        change("model.moe.router.group_score", json!("top2_sum"))
            .with("model.moe.router.top_groups", json!(1)),
        change("model.moe.router.even_groups", json!(true)),
        change("model.moe.router.force_balance", json!(true))
            .with("model.moe.router.groups", json!(1))
            .with("model.moe.router.top_groups", json!(1)),
        change("model.moe.load_balance", json!(0.02)),
        change("model.moe.load_balance_over", json!("batch")),
        change("model.moe.load_balance_pool_layers", json!(true)),
        change("model.moe.z_loss", json!(0.001)),
        change("model.moe.bias_update_rate", json!(0.01)),
        change("model.moe.router.bias", json!("trained")),
        change("model.moe.dispatch", json!("standard")).with("model.moe.least_loaded", json!({})),
        change("model.moe.least_loaded.capacity", json!(1.5)),
        change("model.moe.least_loaded.min_tokens", json!(8)),
        change("model.moe.least_loaded.threshold", json!(1.1)),
        change("model.moe.least_loaded.threshold_over", json!("expert")),
        change("model.moe.least_loaded.strict_paper", json!(true)),
        change("model.moe.placement.every", json!(50)),
        change("model.moe.placement.smoothing", json!(0.5)),
        change("model.moe.placement.min_gain", json!(0.1)),
    ]
}

fn layout_changes() -> Vec<Change> {
    vec![
        change("parallel.data", json!(2)),
        change("parallel.tensor", json!(2)),
        change("parallel.context", json!(2)),
        change("parallel.context_attention", json!("ulysses")),
        change("parallel.expert", json!(1)),
        change("parallel.expert_tensor", json!(2)).with("parallel.expert", json!(1)),
        change("parallel.expert_chunks", json!(2)),
        change("parallel.ranks_per_node", json!(1)),
        change("parallel.pipeline", json!(2)).with("parallel.expert", json!(1)),
        change("parallel.schedule", json!("gpipe")),
        change("parallel.chunks", json!(1)),
        change("parallel.stage_layers", json!([3])),
        change("parallel.vocabulary", json!("redis")),
        change("parallel.zero", json!(1)),
        change("parallel.zero_group_size", json!(2)).with("parallel.zero", json!(1)),
        change("parallel.recompute.layers", json!("all")),
        change("parallel.recompute.parts", json!(["norm"])),
        change("parallel.tensor_chunks", json!(2)),
        change("parallel.bucket_mib", json!(1)),
    ]
}

fn run_changes(folder: &Path) -> Vec<Change> {
    let other_source = json!([{"path": folder.join("tokens"), "weight": 2}]);
    let tls = json!({"cert": "cert.pem", "key": "key.pem", "ca": "ca.pem"});
    vec![
        change("run.seed", json!(2)),
        change("run.device", json!("auto")),
        change("run.deterministic", json!(true)),
        change("run.cpu_affinity", json!("cores")),
        change("run.backend", json!("gloo")),
        change("run.timeout_s", json!(200)),
        change("run.log_every", json!(3)),
        change("run.line_buffer_mib", json!(1)),
        change("run.trace_step", json!(100)),
        change("run.tls.cert", json!("other.pem")).with("run.tls", tls.clone()),
        change("run.tls.key", json!("other.pem")).with("run.tls", tls.clone()),
        change("run.tls.ca", json!("other.pem")).with("run.tls", tls),
        change("data.train", other_source.clone()),
        change("data.validation", other_source),
        change("data.sequence_length", json!(16)),
        change("data.eod_token", json!(0)).with("data.eod_token", json!(1)),
        change("data.mask_documents", json!(false)).with("data.eod_token", json!(0)),
        change("data.reset_positions", json!(true)).with("data.eod_token", json!(0)),
        change("data.eod_mask_loss", json!(true)).with("data.eod_token", json!(0)),
        change("data.max_epochs", json!(2.0)),
        change("data.tokenizer", json!(folder.join("other.json"))),
        change("train.steps", json!(STEPS_BEFORE + STEPS_AFTER + 1)),
        change("train.global_batch", json!(16)),
        change("train.micro_batch", json!(1)),
        change("train.dtype", json!("bf16")),
        change("train.fp8_experts", json!(true)).with("train.dtype", json!("bf16")),
        change("train.grad_clip", json!(0.5)),
        change("optimizer.beta1", json!(0.8)),
        change("optimizer.beta2", json!(0.9)),
        change("optimizer.eps", json!(1e-5)),
        change("optimizer.weight_decay", json!(0.0)),
        change("optimizer.offload", json!(true)),
        change("optimizer.state_dtype", json!("bf16")),
        change("optimizer.groups", json!([{"muon": {}}])),
        change("optimizer.qk_clip", json!({"threshold": 0.1})),
        change("schedule", json!({"constant": {"lr": 1e-3}})),
    ]
}

fn durability_changes() -> Vec<Change> {
    vec![
        change("checkpoint.every", json!(50)),
        change("checkpoint.keep", json!(5)),
        change("snapshot.every", json!(3)),
        change("snapshot.redundancy", json!("none")),
        change("snapshot.memory_gib", json!(1)),
        change("snapshot.nodes_per_domain", json!(2)),
        change("restart.max_restarts", json!(1)),
        change("restart.window_s", json!(60)),
        change("restart.heartbeat_timeout_s", json!(20)),
        change("restart.step_timeout_s", json!(100)),
        change("restart.on_divergence", json!("stop")),
        change("restart.without_spare", json!("shrink")),
        change("restart.standby", json!(false)),
        change("validation.every", json!(50)),
        change("validation.sequences", json!(3)),
        change("validation.at_start", json!(false)),
    ]
}

fn changes(folder: &Path) -> Vec<Change> {
    let mut all = model_changes();
    all.extend(moe_changes());
    all.extend(layout_changes());
    all.extend(run_changes(folder));
    all.extend(durability_changes());
    all
}

fn config(value: &Value) -> Config {
    let config: Config = serde_json::from_value(value.clone()).unwrap();
    assert_eq!(config.problems(2), Vec::<String>::new(), "{value}");
    config
}

/// Trains the first steps of a run on 2 ranks and saves a checkpoint.
fn train_and_save(value: &Value) {
    let config = config(value);
    run_on_threads(2, TIMEOUT, move |world| {
        let mut trainer = trainer_on(world, config.clone());
        for _ in 0..STEPS_BEFORE {
            trainer.train_step(false).unwrap();
        }
        trainer.save().unwrap();
    });
}

/// The losses after a resume, and what it reported.
#[derive(Debug, Clone)]
struct Resumed {
    losses: Vec<f64>,
    report: ResumeReport,
}

/// Resumes the run on 2 ranks and trains further steps, or returns the refusal.
fn resume(value: &Value) -> Result<Resumed, String> {
    let config = config(value);
    let results = run_on_threads(2, TIMEOUT, move |world| {
        let mut trainer = trainer_on(world, config.clone());
        let source = trainer
            .resume(&mut |warning| assert!(warning.contains("learning rate jumps"), "{warning}"))
            .map_err(|error| error.to_string())?;
        assert_eq!(source, ResumeSource::Checkpoint);
        let report = trainer.resume_report().clone();
        let steps = 0..STEPS_AFTER;
        let losses = steps.map(|_| trainer.train_step(false).unwrap().0.loss);
        Ok(Resumed {
            losses: losses.collect(),
            report,
        })
    });
    results.into_iter().next().unwrap()
}

/// Returns the bytes of every file below a folder.
fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(contents(&path));
        } else {
            let name = path.display().to_string();
            files.insert(name, std::fs::read(&path).unwrap());
        }
    }
    files
}

#[test]
fn every_key_has_a_change_here() {
    let folder = tempfile::tempdir().unwrap();
    let changed: Vec<&str> = changes(folder.path())
        .iter()
        .map(|change| change.key)
        .collect();
    for (key, _) in Config::resume_effects() {
        let is_identity = key == "run.dir";
        assert!(is_identity || changed.contains(&key.as_str()), "{key}");
    }
}

#[test]
fn changed_keys_have_the_effect_of_their_declaration() {
    tch::set_num_threads(1);
    let folder = tempfile::tempdir().unwrap();
    write_data(folder.path());
    let effects = Config::resume_effects();
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    let mut references: BTreeMap<String, Resumed> = BTreeMap::new();
    let mut in_folder = Value::Null;
    for change in changes(folder.path()) {
        let key = change.key;
        let effect = effects[key].as_str().unwrap();
        *counts.entry(effect).or_default() += 1;
        let mut before = base(folder.path());
        change.prepare(&mut before);
        // A resume alone writes nothing, so most keys share a checkpoint.
        if before != in_folder {
            let _ = std::fs::remove_dir_all(folder.path().join("run"));
            train_and_save(&before);
            in_folder = before.clone();
        }
        let reference = references
            .entry(before.to_string())
            .or_insert_with(|| resume(&before).unwrap())
            .clone();
        assert_eq!(reference.report, ResumeReport::default(), "{key}");
        let mut after = before.clone();
        change.apply(&mut after);
        let untouched = contents(folder.path());
        let resumed = resume(&after);
        match effect {
            "refused" => {
                let refusal = resumed.unwrap_err();
                assert!(refusal.contains(&format!("{key}: ")), "{key}: {refusal}");
                assert_eq!(contents(folder.path()), untouched, "{key}");
            }
            "reported" => {
                let report = resumed.unwrap().report;
                let reported: Vec<&str> = report.changes.iter().map(|c| c.key.as_str()).collect();
                assert_eq!(reported, [key]);
            }
            _ => {
                let resumed = resumed.unwrap();
                assert_eq!(resumed.report, ResumeReport::default(), "{key}");
                assert_agree(key, &resumed.losses, &reference.losses);
            }
        }
    }
    eprintln!("changed keys by effect: {counts:?}");
    assert!(counts.values().all(|&count| count > 10), "{counts:?}");
}

/// Compares losses: layouts sum in another order, all other free keys give the same bits.
fn assert_agree(key: &str, losses: &[f64], reference: &[f64]) {
    let is_layout = ["parallel.", "model.moe.", "run.backend"]
        .iter()
        .any(|prefix| key.starts_with(prefix));
    if !is_layout {
        assert_eq!(losses, reference, "{key}");
    }
    for (loss, reference) in losses.iter().zip(reference) {
        assert!((loss - reference).abs() <= 1e-5 * reference, "{key}");
    }
}

/// The stateful features: their state is kept, begun or dropped, and that is reported.
#[test]
fn stateful_features_can_be_switched() {
    tch::set_num_threads(1);
    let folder = tempfile::tempdir().unwrap();
    write_data(folder.path());
    let switched = |from: (&'static str, Value), to: Value| {
        let _ = std::fs::remove_dir_all(folder.path().join("run"));
        let mut config = base(folder.path());
        set(&mut config, from.0, from.1);
        train_and_save(&config);
        set(&mut config, from.0, to);
        resume(&config).unwrap().report.notes.join("; ")
    };
    let rate = "model.moe.bias_update_rate";
    let on = switched((rate, json!(0)), json!(0.01));
    assert!(on.contains("its biases start at 0"), "{on}");
    let off = switched((rate, json!(0.01)), json!(0));
    assert!(off.contains("its biases are kept"), "{off}");
    let placement = "model.moe.placement";
    let on = switched((placement, Value::Null), json!({"every": 1}));
    assert!(on.contains("with loads of 0"), "{on}");
    let off = switched((placement, json!({"every": 1})), Value::Null);
    assert!(off.contains("loads are dropped"), "{off}");
}

/// Biases that are kept select experts, and later checkpoints have them.
#[test]
fn kept_biases_are_used_and_saved() {
    tch::set_num_threads(1);
    let folder = tempfile::tempdir().unwrap();
    write_data(folder.path());
    let mut value = base(folder.path());
    // So large a step that the biases alone decide.
    set(&mut value, "model.moe.bias_update_rate", json!(1));
    train_and_save(&value);
    set(&mut value, "model.moe.bias_update_rate", json!(0));
    let with_biases = resume(&value).unwrap().losses;
    let off = config(&value);
    let names = run_on_threads(2, TIMEOUT, move |world| {
        let mut trainer = trainer_on(world, off.clone());
        trainer.resume(&mut |warning| panic!("{warning}")).unwrap();
        trainer.train_step(false).unwrap();
        trainer.save().unwrap();
        let biases = trainer.model().biases();
        biases.map(|(_, name, _)| name).collect::<Vec<_>>()
    });
    assert_eq!(names[0].len(), 2);
    let newest = &checkpoint::list(&folder.path().join("run/checkpoints")).unwrap()[0];
    let manifest = checkpoint::Checkpoint::open(newest).unwrap();
    let tensors = &manifest.manifest().tensors;
    assert!(
        names[0]
            .iter()
            .all(|name| tensors.contains_key(&format!("bias/{name}")))
    );
    let _ = std::fs::remove_dir_all(folder.path().join("run"));
    train_and_save(&value);
    assert_ne!(resume(&value).unwrap().losses, with_biases);
}

/// Every refused change ends `moerun train` before it writes anything.
#[test]
fn refused_changes_leave_the_run_as_it_is() {
    let experiment = Experiment::new();
    let trained = finish(&mut experiment.train(2, &["train.steps=4", "snapshot.every=0"]));
    assert!(trained.status.success(), "{}", text(&trained));
    let untouched = contents(&experiment.path("run"));
    for (key, value) in [
        ("model.layers", "1"),
        ("model.layers", "3"),
        ("model.qk_norm", "full"),
        ("model.heads", "2"),
        ("model.rope_theta", "500000"),
        ("model.norm_eps", "1e-6"),
        ("model.tie_embeddings", "true"),
        ("model.moe.top_k", "1"),
        ("model.moe.experts", "2"),
        ("model.moe.router.score", "sigmoid"),
        ("model.moe.router.scale", "2.5"),
        ("model.moe.shared_experts", "1"),
        ("model.mup", "{width: 2}"),
    ] {
        let change = format!("{key}={value}");
        let refused = finish(&mut experiment.train(2, &["train.steps=8", &change]));
        let output = text(&refused);
        assert!(!refused.status.success(), "{change}: {output}");
        assert!(output.contains(&format!("  {key}: ")), "{change}: {output}");
        assert!(output.contains("--accept-changes"), "{output}");
        assert_eq!(contents(&experiment.path("run")), untouched, "{change}");
        let mut diff = experiment.moerun(&["config", "diff", "run", "small.yaml"]);
        let diff = finish(diff.args(["--set", &change]));
        assert_eq!(diff.status.code(), Some(1), "{change}");
        assert!(
            text(&diff).contains(&format!("refused   {key}: ")),
            "{}",
            text(&diff)
        );
    }
    let unknown = ["--accept-changes", "model.layer"];
    let refused = finish(experiment.train(2, &["train.steps=8"]).args(unknown));
    assert!(
        text(&refused).contains("did you mean model.layers?"),
        "{}",
        text(&refused)
    );
}

/// An accepted change lists what becomes of each tensor, and no checkpoint with more parameters is
/// removed.
#[test]
fn accepted_changes_name_each_tensor() {
    let experiment = Experiment::new();
    let first = ["train.steps=4", "snapshot.every=0", "checkpoint.keep=1"];
    let trained = finish(&mut experiment.train(2, &first));
    assert!(trained.status.success(), "{}", text(&trained));
    let more = ["train.steps=8", "model.layers=1", "checkpoint.keep=1"];
    let accepted = ["--accept-changes", "model.layers"];
    let resumed = finish(experiment.train(2, &more).args(accepted));
    let output = text(&resumed);
    assert!(resumed.status.success(), "{output}");
    for line in [
        "changed since the saved state: model.layers: 2 -> 1",
        "changed since the saved state: train.steps: 4 -> 8",
        "is in the checkpoint only: it is omitted",
    ] {
        assert!(output.contains(line), "{line}: {output}");
    }
    let recorded = std::fs::read_to_string(experiment.path("run/restarts.jsonl")).unwrap();
    let record: Value = serde_json::from_str(recorded.lines().next().unwrap()).unwrap();
    assert_eq!(record["step"], 4);
    assert_eq!(
        record["changes"][0],
        json!({"key": "model.layers", "saved": 2, "now": 1})
    );
    let checkpoints = experiment.path("run/checkpoints");
    assert!(
        checkpoints.join("step-00000004").exists(),
        "it has more parameters"
    );
    assert!(checkpoints.join("step-00000008").exists());
}
