//! A run that the previous version began: its configuration is refused with the new names, and its
//! checkpoint resumes.
//!
//! `previous_version/` is the folder of a run of 4 steps on 4 ranks by commit ece63c3, with the
//! checkpoint of step 2.

use crate::fixture::{Experiment, finish, text};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

const RENAMED: [(&str, &str); 5] = [
    ("bind:", "cpu_affinity:"),
    ("communicator:", "backend:"),
    ("document_end:", "eod_token:"),     // tidy: allow(words)
    ("zero_ranks:", "zero_group_size:"), // tidy: allow(words)
    ("parts: [router]", "parts: [dispatch]"),
];

const REFUSAL: [&str; 7] = [
    "error: old.yaml: 5 keys have new names",
    "  run.bind -> run.cpu_affinity",
    "  run.communicator -> run.backend",
    "  data.document_end -> data.eod_token", // tidy: allow(words)
    "  parallel.zero_ranks -> parallel.zero_group_size", // tidy: allow(words)
    "  parallel.recompute.parts: router -> dispatch",
    "hint: rename them; nothing else changed",
];

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/previous_version")
}

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_folder(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// Returns the loss of each step.
fn losses(run: &Path) -> BTreeMap<u64, f64> {
    let lines = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let lines = lines
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines
        .map(|line| {
            (
                line["step"].as_u64().unwrap(),
                line["loss"].as_f64().unwrap(),
            )
        })
        .collect()
}

#[test]
fn its_configuration_is_refused_and_its_checkpoint_resumes() {
    let experiment = Experiment::new();
    copy_folder(&fixture(), &experiment.path("."));
    let train = || experiment.moerun(&["train", "old.yaml", "-n", "4"]);

    let refused = finish(&mut train());
    assert!(!refused.status.success());
    let output = text(&refused);
    assert!(output.contains(&REFUSAL.join("\n")), "{output}");

    let path = experiment.path("old.yaml");
    let mut config = std::fs::read_to_string(&path).unwrap();
    for (old, new) in RENAMED {
        config = config.replace(old, new);
    }
    std::fs::write(&path, config).unwrap();
    let resumed = finish(&mut train());
    let output = text(&resumed);
    assert!(resumed.status.success(), "{output}");
    assert!(output.contains("the checkpoint of step 2"), "{output}");
    assert!(
        output.contains("version 1 of the order, with which the run began"),
        "{output}"
    );
    assert!(
        !output.contains("changed since the saved state: data."),
        "{output}"
    );
    let log = std::fs::read_to_string(experiment.path("run/logs/rank-0.log")).unwrap();
    for text in [output, log] {
        assert!(!text.contains("differs from the checkpoint"), "{text}");
    }

    let expected = losses(&fixture().join("run"));
    let actual = losses(&experiment.path("run"));
    assert_eq!(actual.keys().collect::<Vec<_>>(), [&1, &2, &3, &4]);
    for (step, loss) in &expected {
        let difference = (actual[step] - loss).abs() / loss;
        assert!(difference <= 1e-5, "step {step}: {} {loss}", actual[step]);
    }
    // A rule of the earlier version is no change.
    let restarts = std::fs::read_to_string(experiment.path("run/restarts.jsonl"));
    assert!(
        !restarts
            .unwrap_or_default()
            .contains("version 1 of the order")
    );
    // The new lines have the new names.
    let metrics = std::fs::read_to_string(experiment.path("run/metrics.jsonl")).unwrap();
    let last = metrics.lines().last().unwrap();
    assert!(last.contains("internode_bytes"), "{last}");
}

/// Several sources of validation data were read as one: the figure of the saved step stays.
#[test]
fn its_validation_of_several_sources_is_not_repeated() {
    let experiment = Experiment::new();
    copy_folder(&fixture(), &experiment.path("."));
    let path = experiment.path("run/checkpoints/step-00000002/manifest.json");
    let mut manifest: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let config = &mut manifest["state"]["config"];
    config["validation"] = json!({"every": 2, "sequences": 4});
    config["data"]["validation"] = json!([
        {"path": "data/valid", "weight": 1.0},
        {"path": "data/train", "weight": 1.0},
    ]);
    std::fs::write(&path, manifest.to_string()).unwrap();
    let metrics = experiment.path("run/metrics.jsonl");
    let lines = std::fs::read_to_string(&metrics).unwrap();
    let with_validation: Vec<String> = lines
        .lines()
        .take(2)
        .map(str::to_string)
        .chain([json!({"step": 2, "validation_loss": 9.5}).to_string()])
        .collect();
    std::fs::write(&metrics, with_validation.join("\n") + "\n").unwrap();
    let path = experiment.path("old.yaml");
    let mut config = std::fs::read_to_string(&path).unwrap();
    for (old, new) in RENAMED {
        config = config.replace(old, new);
    }
    let sources = "  validation: [{path: data/valid}, {path: data/train}]\n  sequence_length";
    config = config.replace("  sequence_length", sources);
    config += "validation: {every: 2, sequences: 4}\n";
    std::fs::write(&path, config).unwrap();
    let resumed = finish(&mut experiment.moerun(&["train", "old.yaml", "-n", "4"]));
    let output = text(&resumed);
    assert!(resumed.status.success(), "{output}");
    assert!(
        output.contains("the validation loss is now one over all sources of data.validation"),
        "{output}"
    );
    assert!(
        !output.contains("changed since the saved state: data."),
        "{output}"
    );
    let lines = std::fs::read_to_string(&metrics).unwrap();
    let lines = lines
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap());
    let validations: Vec<Value> = lines
        .filter(|line| !line["validation_loss"].is_null())
        .collect();
    let steps: Vec<u64> = validations
        .iter()
        .map(|line| line["step"].as_u64().unwrap())
        .collect();
    assert_eq!(steps, [2, 4]);
    assert_eq!(validations[0]["validation_loss"], 9.5);
    assert!(validations[1]["validation"]["valid"].is_f64());
}

#[test]
fn its_checkpoint_generates_and_its_routing_is_drawn() {
    let experiment = Experiment::new();
    copy_folder(&fixture(), &experiment.path("."));
    let mut generate = experiment.moerun(&["generate", "--checkpoint", "run"]);
    let generated = finish(generate.args(["--max-tokens", "4", "--prompt", "a"]));
    assert!(generated.status.success(), "{}", text(&generated));

    let routing = finish(&mut experiment.moerun(&["inspect", "routing", "run"]));
    let output = text(&routing);
    assert!(routing.status.success(), "{output}");
    assert!(output.contains("routing consistency"), "{output}");
    assert!(!output.contains("no routing consistency"), "{output}");
}
