//! Numbers, paths and changes at their limits, as users write them: each is accepted with the
//! meaning that it has in the file, or refused by name before anything starts.

use crate::fixture::{Experiment, finish, refused, text};
use std::{
    os::unix::fs::PermissionsExt,
    process::Command,
    time::{Duration, Instant},
};

const LIMIT: Duration = Duration::from_secs(20);

/// Runs a command, which ends soon and without a panic, and returns its success and its output.
fn run(command: &mut Command) -> (bool, String) {
    let started = Instant::now();
    let output = finish(command);
    let said = text(&output);
    assert!(started.elapsed() < LIMIT, "{:?}: {said}", started.elapsed());
    assert!(!said.contains("panicked"), "{said}");
    (output.status.success(), said)
}

fn accepted(command: &mut Command) -> String {
    let (succeeded, said) = run(command);
    assert!(succeeded, "{said}");
    said
}

/// Thirteen numbers beyond their range and a missing file, all in one message.
#[test]
fn all_numbers_out_of_range_are_named_at_once() {
    let experiment = Experiment::without_data();
    let config = "\
run: {dir: run}
model: {vocab_size: 100, hidden: 32, layers: 2, heads: 2, rope_theta: -1, norm_eps: -1, init_std: 0,
  moe: {experts: 4, top_k: 2, ffn: 32, load_balance: -1, z_loss: -1, bias_update_rate: -1,
    router: {scale: 0}}}
data: {train: [{path: nowhere}], sequence_length: 32}
train: {steps: 20, global_batch: 4, micro_batch: 2}
optimizer: {beta1: 1.5, beta2: 1.0, eps: -1, weight_decay: .nan}
schedule: {cosine: {lr: .inf, final_ratio: -1}}
";
    std::fs::write(experiment.path("wrong.yaml"), config).unwrap();
    let words = [
        "model.rope_theta is -1",
        "model.norm_eps is -1",
        "model.init_std is 0",
        "model.moe.load_balance is -1",
        "model.moe.z_loss is -1",
        "model.moe.bias_update_rate is -1",
        "model.moe.router.scale is 0",
        "optimizer.beta1 is 1.5",
        "optimizer.beta2 is 1",
        "optimizer.eps is -1",
        "optimizer.weight_decay",
        "schedule.cosine.lr",
        "schedule.cosine.final_ratio is -1",
        "nowhere",
    ];
    refused(
        &experiment,
        &mut experiment.moerun(&["config", "check", "wrong.yaml"]),
        &words,
    );
    refused(
        &experiment,
        &mut experiment.moerun(&["train", "wrong.yaml"]),
        &words,
    );
    assert!(!experiment.path("run").exists());
}

#[test]
fn paths_expand_the_home_folder_and_variables() {
    let experiment = Experiment::new();
    let home = experiment.path("home");
    std::fs::create_dir(&home).unwrap();
    let train = |dir: &str| {
        let change = format!("run.dir={dir}");
        let mut command = experiment.train(1, &["parallel.expert=1", "train.steps=2", &change]);
        command
            .env("HOME", &home)
            .env("SCRATCH", experiment.path("scratch"));
        command
    };
    accepted(&mut train("~/runs/x"));
    assert!(home.join("runs/x/metrics.jsonl").exists());
    accepted(&mut train("$SCRATCH/y"));
    assert!(experiment.path("scratch/y/metrics.jsonl").exists());
    accepted(&mut train("${SCRATCH}/z"));
    assert!(experiment.path("scratch/z/metrics.jsonl").exists());
    refused(
        &experiment,
        &mut train("$NOWHERE/x"),
        &["run.dir", "NOWHERE"],
    );
    refused(
        &experiment,
        &mut train("~operator/x"),
        &["run.dir", "~operator"],
    );
    assert!(!experiment.path("~").exists() && !experiment.path("$SCRATCH").exists());
}

#[test]
fn set_takes_what_a_file_takes() {
    let experiment = Experiment::new();
    let text = std::fs::read_to_string(experiment.path("small.yaml")).unwrap();
    let without: Vec<&str> = text
        .lines()
        .filter(|line| !line.starts_with("validation:"))
        .collect();
    std::fs::write(experiment.path("small.yaml"), without.join("\n")).unwrap();
    let check = |changes: &[&str]| {
        let mut command = experiment.moerun(&["config", "check", "small.yaml", "-n", "2"]);
        for change in changes {
            command.args(["--set", change]);
        }
        command
    };
    let said = accepted(&mut check(&[
        "validation.every=5",
        "validation.sequences=4",
    ]));
    assert!(said.contains("sequences: 4"), "{said}");
    assert!(accepted(&mut check(&["model.mup.width=4"])).contains("width: 4"));
    assert!(accepted(&mut check(&["run.dir=12345"])).contains("12345"));
    accepted(&mut check(&["run.dir=no"]));
    // A number without a fraction is an integer, and null is the default.
    assert!(accepted(&mut check(&["train.steps=1e3"])).contains("steps: 1000"));
    assert!(accepted(&mut check(&["run.log_every=null"])).contains("log_every: 10"));
    refused(
        &experiment,
        &mut check(&["train.steps=1.5"]),
        &["train.steps", "1.5"],
    );
    refused(&experiment, &mut check(&["train.steps=null"]), &["steps"]);
    let shorter = text.replace("steps: 20, ", "");
    std::fs::write(experiment.path("small.yaml"), shorter).unwrap();
    accepted(&mut check(&["train.steps=7"]));
    refused(&experiment, &mut check(&[]), &["steps"]);
}

#[test]
fn sizes_neither_overflow_nor_hang() {
    let experiment = Experiment::new();
    for change in [
        "snapshot.redundancy={parity: {data: 0, parity: 0}}",
        "snapshot.redundancy={copies: 18446744073709551615}",
        "train.micro_batch=18446744073709551615",
        "model.layers=1000000000",
        "model.heads=9223372036854775807",
        "restart.heartbeat_timeout_s=1e300",
        "restart.step_timeout_s=1e300",
        "run.timeout_s=18446744073709551615",
        "parallel.tensor=4611686018427387904",
    ] {
        let key = change.split(['=', '.']).nth(1).unwrap();
        let mut check = experiment.moerun(&["config", "check", "small.yaml", "-n", "2"]);
        refused(&experiment, check.args(["--set", change]), &[key]);
        refused(&experiment, &mut experiment.train(2, &[change]), &[key]);
    }
    for change in [
        "model.moe.experts=4611686018427387904",
        "data.sequence_length=9223372036854775807",
        "model.layers=1000000000",
    ] {
        let key = change.split(['=', '.']).rev().nth(1).unwrap();
        let mut mesh = experiment.moerun(&["plan", "mesh", "small.yaml", "-n", "2"]);
        refused(&experiment, mesh.args(["--set", change]), &[key]);
    }
    // Within their ranges, but more than any machine has.
    let large = "model.vocab_size=2147483648";
    refused(&experiment, &mut experiment.train(2, &[large]), &["memory"]);
    assert!(!experiment.path("run").exists());
    experiment.assert_no_orphans();
}

#[test]
fn arguments_and_variables_have_ranges() {
    let experiment = Experiment::new();
    let nodes = ["--nnodes", "99999999999999", "--rdzv", "127.0.0.1:0"];
    refused(
        &experiment,
        experiment.train(1, &[]).args(nodes),
        &["--nnodes", "99999999999999"],
    );
    refused(
        &experiment,
        &mut experiment.train(99999999999, &[]),
        &["99999999999"],
    );
    let schedule = ["plan", "schedule", "1f1b", "-m", "18446744073709551615"];
    refused(
        &experiment,
        &mut experiment.moerun(&schedule),
        &["18446744073709551615"],
    );
    let world = "99999999999";
    let mut ranks = experiment.moerun(&["train", "small.yaml"]);
    ranks.env("RANK", "0").env("WORLD_SIZE", world);
    ranks
        .env("MASTER_ADDR", "127.0.0.1")
        .env("MASTER_PORT", "1");
    refused(&experiment, &mut ranks, &["WORLD_SIZE", world]);
    for (name, value) in [
        ("SLURM_TASKS_PER_NODE", "1(x99999999999)"),
        ("SLURM_JOB_ID", "18446744073709551616"),
        ("SLURM_PROCID", "-1"),
    ] {
        let mut task = experiment.moerun(&["train", "small.yaml"]);
        for (name, value) in [
            ("SLURM_PROCID", "0"),
            ("SLURM_STEP_ID", "0"),
            ("SLURM_STEP_NUM_TASKS", "2"),
            ("SLURM_LOCALID", "0"),
            ("SLURM_NODEID", "0"),
            ("SLURM_TASKS_PER_NODE", "1(x2)"),
            ("SLURM_JOB_NODELIST", "a"),
        ] {
            task.env(name, value);
        }
        refused(&experiment, task.env(name, value), &[name, value]);
    }
}

#[test]
fn numbers_in_files_have_ranges() {
    let experiment = Experiment::new();
    let order = "placement: loop\nchunks: 1\nranks:\n\
                 - F0 B0 F1 B1\n- F0 B0 F1 F18446744073709551615\n";
    std::fs::write(experiment.path("order.yaml"), order).unwrap();
    let mut plan = experiment.moerun(&["plan", "schedule", "order.yaml"]);
    refused(
        &experiment,
        &mut plan,
        &["order.yaml", "F18446744073709551615"],
    );
    std::fs::create_dir(experiment.path("r")).unwrap();
    let registry = serde_json::json!({
        "secret": "ab".repeat(32), "generation": 1, "skips": {}, "keepers": [], "spares": 3,
    });
    let path = experiment.path("r/keepers.json");
    std::fs::write(&path, registry.to_string()).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    let mut status = experiment.moerun(&["snapshot", "status", "r"]);
    refused(&experiment, &mut status, &["keepers.json", "spares is 3"]);
}

/// A checkpoint whose configuration was edited to something impossible is refused by name.
#[test]
fn the_configuration_in_a_checkpoint_is_checked() {
    let experiment = Experiment::new();
    accepted(&mut experiment.train(2, &["train.steps=5", "snapshot.every=0"]));
    let manifest = experiment.path("run/checkpoints/step-00000005/manifest.json");
    let original = std::fs::read_to_string(&manifest).unwrap();
    // As an earlier version wrote it: a checksum would refuse any change.
    let (original, _checksum) = original.rsplit_once(",\"crc32c\"").unwrap();
    let original = format!("{original}}}");
    for (from, to) in [
        ("\"layers\":2", "\"layers\":1000000000"),
        ("\"heads\":4", "\"heads\":0"),
    ] {
        assert!(original.contains(from));
        std::fs::write(&manifest, original.replace(from, to)).unwrap();
        let mut generate = experiment.moerun(&["generate", "--checkpoint", "run"]);
        let key = from.split('"').nth(1).unwrap();
        refused(
            &experiment,
            &mut generate,
            &["step-00000005", &format!("model.{key}")],
        );
    }
}

/// Escape sequences from a file do not reach the terminal.
#[test]
fn text_from_files_is_escaped() {
    let experiment = Experiment::without_data();
    std::fs::write(experiment.path("x.yaml"), "run: {\"d\\eir\": 1}\n").unwrap();
    let (succeeded, said) = run(&mut experiment.moerun(&["config", "check", "x.yaml"]));
    assert!(!succeeded && !said.contains('\x1b'), "{said:?}");
    let evil = "run.dir=\u{1b}[31mred\u{1b}[0m";
    let (_, said) = run(&mut experiment.train(2, &[evil, "train.steps=-1"]));
    assert!(!said.contains('\x1b'), "{said:?}");
}
