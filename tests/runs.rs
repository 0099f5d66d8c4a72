//! Runs of real processes with real faults: kill -9, signals, damaged and unwritable files; and
//! torchrun's environment.

use crate::fixture::{
    Experiment, curve, finish, finish_child, rank_process, signal, start, steps_done, text,
    wait_for_step,
};
use std::{
    os::unix::process::ExitStatusExt,
    path::Path,
    process::{Child, Command},
    time::SystemTime,
};

/// Steps take milliseconds here: with a snapshot at each, a due checkpoint finds no free slot and
/// is written a few steps later.
const SNAPSHOT_EVERY_5: &str = "snapshot.every=5";

#[test]
fn killed_at_any_moment_it_resumes_bit_for_bit() {
    let experiment = Experiment::new();
    let steps = "train.steps=60";
    let unbroken = finish(&mut experiment.train(4, &[steps, "run.dir=unbroken"]));
    assert!(unbroken.status.success(), "{}", text(&unbroken));
    let mut moment = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap()
        .subsec_nanos() as u64;
    let mut killed_at = Vec::new();
    for part in 0..2u64 {
        moment = moment.wrapping_mul(6364136223846793005).wrapping_add(1);
        let step = 1 + part * 25 + (moment >> 33) % 25;
        killed_at.push(step);
        let mut launcher = start(&mut experiment.train(4, &[steps, "run.dir=broken"]));
        wait_for_step(&experiment, "broken", step);
        launcher.kill().unwrap();
        launcher.wait().unwrap();
        experiment.assert_only_keepers();
        // Without the keepers, only a checkpoint is left.
        if part == 1 {
            assert!(
                finish(&mut experiment.moerun(&["keeper", "stop", "broken"]))
                    .status
                    .success()
            );
            experiment.assert_no_orphans();
        }
    }
    let resumed = finish(&mut experiment.train(4, &[steps, "run.dir=broken"]));
    assert!(resumed.status.success(), "{}", text(&resumed));
    assert!(
        text(&resumed).contains("resuming from the checkpoint of step"),
        "{}",
        text(&resumed)
    );
    let broken = curve(&experiment, "broken");
    let unbroken = curve(&experiment, "unbroken");
    assert_eq!(unbroken.len(), 60 + 6, "60 steps and 6 validations");
    assert_eq!(broken, unbroken, "killed at steps {killed_at:?}");
}

/// A run that resumes after a validation has its line once, whether the earlier run wrote it or a
/// crash left a part of it or nothing.
#[test]
fn each_validation_has_one_line() {
    let experiment = Experiment::new();
    let train = |steps: &str, dir: &str| {
        let output = finish(&mut experiment.train(2, &[steps, dir]));
        assert!(output.status.success(), "{}", text(&output));
    };
    train("train.steps=20", "run.dir=unbroken");
    let unbroken = curve(&experiment, "unbroken");
    train("train.steps=10", "run.dir=run");
    let path = experiment.path("run/metrics.jsonl");
    let written = std::fs::read_to_string(&path).unwrap();
    let validation = written.find("{\"step\":10,\"validation_loss\"").unwrap();
    let moved = experiment.path("moved");
    for kept in [written.len(), validation, validation + 25, 0] {
        std::fs::rename(experiment.path("run"), &moved).unwrap();
        copy_folder(&moved, &experiment.path("run"));
        std::fs::write(&path, &written[..kept]).unwrap();
        train("train.steps=20", "run.dir=run");
        let mut resumed = curve(&experiment, "run");
        let missing = if kept == 0 { 10 } else { 0 };
        if missing > 0 {
            assert_eq!(resumed.remove(0)["dropped_steps"], missing);
        }
        assert_eq!(resumed, unbroken[missing..], "{kept} bytes were left");
        std::fs::remove_dir_all(experiment.path("run")).unwrap();
        std::fs::rename(&moved, experiment.path("run")).unwrap();
    }
}

fn copy_folder(from: &Path, to: &Path) {
    let copied = finish(Command::new("cp").arg("-r").args([from, to]));
    assert!(copied.status.success(), "{}", text(&copied));
}

#[test]
fn a_killed_rank_ends_the_run_by_name_and_leaves_no_orphan() {
    let experiment = Experiment::new();
    let launcher = start(&mut experiment.train(
        4,
        &[
            "train.steps=100000",
            "checkpoint.every=0",
            "restart.max_restarts=0",
        ],
    ));
    wait_for_step(&experiment, "run", 3);
    signal(&rank_process(&experiment, 2), "KILL");
    let output = finish_child(launcher);
    assert!(!output.status.success());
    let said = text(&output);
    assert!(
        said.contains("the state of step"),
        "the state in memory became a checkpoint: {said}"
    );
    assert!(
        said.trim_end()
            .lines()
            .rev()
            .nth(1)
            .unwrap()
            .starts_with("error: rank 2 failed: killed by SIGKILL"),
        "{said}"
    );
    assert!(said.trim_end().ends_with("rank-2.log"), "{said}");
    experiment.assert_no_orphans();
}

#[test]
fn a_stopped_rank_is_a_timeout_that_names_the_operation() {
    let experiment = Experiment::new();
    let changes = [
        "train.steps=100000",
        "run.timeout_s=3",
        "checkpoint.every=0",
        "restart.max_restarts=0",
    ];
    let launcher = start(&mut experiment.train(2, &changes));
    wait_for_step(&experiment, "run", 3);
    signal(&rank_process(&experiment, 1), "STOP");
    let output = finish_child(launcher);
    let said = text(&output);
    assert!(
        !output.status.success()
            && said.contains("rank 0 failed: ")
            && said.contains("of ranks 0, 1 failed"),
        "{said}"
    );
    experiment.assert_no_orphans();
}

#[test]
fn sigterm_and_sigint_write_a_checkpoint() {
    for (name, number) in [("TERM", 15), ("INT", 2)] {
        let experiment = Experiment::new();
        let changes = ["train.steps=1000", "checkpoint.every=0"];
        let launcher = start(&mut experiment.train(2, &changes));
        wait_for_step(&experiment, "run", 4);
        signal(&launcher.id().to_string(), name);
        let output = finish_child(launcher);
        assert_eq!(
            output.status.code(),
            Some(128 + number),
            "{}",
            text(&output)
        );
        assert!(
            text(&output).contains("run the same command to resume"),
            "{}",
            text(&output)
        );
        let done = steps_done(&experiment, "run");
        assert!(
            experiment
                .path(&format!("run/checkpoints/step-{done:08}/manifest.json"))
                .exists()
        );
        experiment.assert_no_orphans();
        let more = format!("train.steps={}", done + 2);
        let resumed = finish(&mut experiment.train(2, &[&more]));
        assert!(
            text(&resumed).contains(&format!("checkpoint of step {done}")),
            "{}",
            text(&resumed)
        );
        assert_eq!(steps_done(&experiment, "run"), done + 2);
    }
}

#[test]
fn a_truncated_checkpoint_is_refused_by_name_and_the_one_before_is_used() {
    let experiment = Experiment::new();
    assert!(
        finish(&mut experiment.train(4, &["train.steps=10", SNAPSHOT_EVERY_5]))
            .status
            .success()
    );
    let shard = experiment.path("run/checkpoints/step-00000010/shard-00001.safetensors");
    let bytes = std::fs::read(&shard).unwrap();
    std::fs::write(&shard, &bytes[..bytes.len() / 2]).unwrap();
    // Saved on 4 ranks, loaded on 2.
    let resumed = finish(&mut experiment.train(2, &["train.steps=12"]));
    let said = text(&resumed);
    assert!(resumed.status.success(), "{said}");
    assert!(
        said.contains("step-00000010 is refused")
            && said.contains("shard-00001.safetensors is damaged"),
        "{said}"
    );
    assert!(
        said.contains("resuming from the checkpoint of step 5"),
        "{said}"
    );
    let steps: Vec<_> = curve(&experiment, "run")
        .iter()
        .map(|line| line["step"].as_u64().unwrap())
        .collect();
    assert_eq!(
        steps.iter().filter(|&&step| step == 7).count(),
        1,
        "a repeated step is listed once: {steps:?}"
    );

    // If all checkpoints are damaged, nothing is overwritten.
    for entry in std::fs::read_dir(experiment.path("run/checkpoints")).unwrap() {
        std::fs::write(entry.unwrap().path().join("manifest.json"), "{").unwrap();
    }
    let refused = finish(&mut experiment.train(1, &["train.steps=12", "parallel.expert=1"]));
    assert!(!refused.status.success());
    assert!(
        text(&refused).contains("move the folder away to start from the beginning"),
        "{}",
        text(&refused)
    );
}

#[test]
fn a_checkpoint_that_cannot_be_written_does_not_end_the_run() {
    let experiment = Experiment::new();
    // A file in place of a checkpoint's folder makes the write fail.
    std::fs::create_dir_all(experiment.path("run/checkpoints")).unwrap();
    std::fs::write(
        experiment.path("run/checkpoints/step-00000005.keepers-writing"),
        "in the way",
    )
    .unwrap();
    std::fs::write(
        experiment.path("run/checkpoints/step-00000042.keepers-writing"),
        "in the way",
    )
    .unwrap();
    let output = finish(&mut experiment.train(2, &["train.steps=42", SNAPSHOT_EVERY_5]));
    let said = text(&output);
    assert!(
        said.contains("warning: no checkpoint at step 5") && said.contains("training continues"),
        "{said}"
    );
    assert_eq!(steps_done(&experiment, "run"), 42);
    // A run without its last checkpoint fails.
    assert!(
        !output.status.success() && said.contains("the state is still in memory"),
        "{said}"
    );
    // Once it can be written, the same command does so.
    std::fs::remove_file(experiment.path("run/checkpoints/step-00000042.keepers-writing")).unwrap();
    let again = finish(&mut experiment.train(2, &["train.steps=42"]));
    assert!(
        again.status.success() && text(&again).contains("had step 42 in memory"),
        "{}",
        text(&again)
    );
    assert!(
        experiment
            .path("run/checkpoints/step-00000042/manifest.json")
            .exists()
    );
    // Between the two, checkpoints could be written, but not at fixed steps: a busy disk gets the
    // newest.
    let between = |step: u64| {
        experiment
            .path(&format!("run/checkpoints/step-{step:08}/manifest.json"))
            .exists()
    };
    assert!((6..42).any(between));
}

#[test]
fn a_full_disk_loses_nothing_that_was_saved() {
    let experiment = Experiment::new();
    let disk = experiment.path("run");
    std::fs::create_dir(&disk).unwrap();
    // Room for two checkpoints of about 0.5 MB, but not for three.
    let mount = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=1400k", "tmpfs"])
        .arg(&disk)
        .output();
    if !mount.is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: this machine does not let a test mount a small disk");
        return;
    }
    let output = finish(&mut experiment.train(2, &["train.steps=30", "checkpoint.keep=9"]));
    let said = text(&output);
    let kept = checkpoint::list(&disk.join("checkpoints")).unwrap();
    let whole = kept.iter().all(|path| {
        let checkpoint = checkpoint::Checkpoint::open(path).unwrap();
        (0..checkpoint.manifest().files.len()).all(|file| checkpoint.verify_file(file).is_ok())
    });
    assert!(said.contains("the state is still in memory"), "{said}");
    let snapshots = text(&finish(
        &mut experiment.moerun(&["snapshot", "status", "run"]),
    ));
    assert!(snapshots.contains("snapshot of step 30"), "{snapshots}");
    assert!(
        finish(&mut experiment.moerun(&["keeper", "stop", "run"]))
            .status
            .success()
    );
    experiment.assert_no_orphans();
    let unmounted = Command::new("umount")
        .arg(&disk)
        .status()
        .unwrap()
        .success();
    assert!(
        unmounted
            && said.contains("No space left on device")
            && said.contains("training continues"),
        "{said}"
    );
    assert!(!kept.is_empty() && whole, "{kept:?}");
    assert!(said.contains("step 30/30"), "{said}");
}

#[test]
fn torchruns_environment_is_enough() {
    let experiment = Experiment::new();
    assert!(
        finish(&mut experiment.train(2, &["train.steps=6", "run.dir=ours"]))
            .status
            .success()
    );
    // What torchrun sets when rank 0 serves the store.
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
        .to_string();
    let ranks: Vec<Child> = (0..2)
        .map(|rank: usize| {
            let mut command = experiment.train(1, &["train.steps=6", "run.dir=theirs"]);
            for (name, value) in [("RANK", rank.to_string()), ("LOCAL_RANK", rank.to_string())] {
                command.env(name, value);
            }
            start(
                command
                    .env("WORLD_SIZE", "2")
                    .env("MASTER_ADDR", "127.0.0.1")
                    .env("MASTER_PORT", &port),
            )
        })
        .collect();
    for rank in ranks {
        let output = finish_child(rank);
        assert!(output.status.success(), "{}", text(&output));
    }
    assert_eq!(curve(&experiment, "ours"), curve(&experiment, "theirs"));

    let has_torch = Command::new("python3")
        .args(["-c", "import torch"])
        .output()
        .is_ok_and(|o| o.status.success());
    if has_torch {
        let mut torchrun = experiment.moerun(&[]);
        let moerun = torchrun.get_program().to_owned();
        torchrun = Command::new("python3");
        torchrun.current_dir(experiment.path("")).args([
            "-m",
            "torch.distributed.run",
            "--no-python",
            "--standalone",
        ]);
        torchrun
            .args(["--nproc-per-node", "2"])
            .arg(moerun)
            .args(["train", "small.yaml"]);
        let output = finish(
            torchrun
                .args(["--set", "train.steps=6", "--set", "run.dir=torchrun"])
                .env("OMP_NUM_THREADS", "1"),
        );
        assert!(output.status.success(), "{}", text(&output));
        assert_eq!(curve(&experiment, "ours"), curve(&experiment, "torchrun"));
    }
}

#[test]
fn ranks_are_bound_to_their_processors() {
    let experiment = Experiment::new();
    let mut launcher =
        start(&mut experiment.train(2, &["train.steps=100000", "run.cpu_affinity=cores"]));
    wait_for_step(&experiment, "run", 2);
    let allowed = |rank| {
        let status = format!("/proc/{}/status", rank_process(&experiment, rank));
        let status = std::fs::read_to_string(status).unwrap();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        line.unwrap().trim().to_string()
    };
    let cores = std::thread::available_parallelism().unwrap().get();
    if cores >= 2 {
        assert_ne!(allowed(0), allowed(1));
    } else {
        let log = std::fs::read_to_string(experiment.path("run/logs/rank-0.log")).unwrap();
        assert!(log.contains("fewer processors than ranks"), "{log}");
    }
    launcher.kill().unwrap();
    launcher.wait().unwrap();
}

#[test]
fn a_trained_model_writes_text() {
    let experiment = Experiment::new();
    assert!(
        finish(&mut experiment.train(4, &["train.steps=8"]))
            .status
            .success()
    );
    let write = |extra: &[&str]| {
        let base = [
            "generate",
            "--checkpoint",
            "run",
            "--prompt",
            "fn main() {",
            "--max-tokens",
            "20",
        ];
        let output = finish(experiment.moerun(&base).args(extra));
        assert!(output.status.success(), "{}", text(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    let first = write(&[]);
    assert!(
        first.starts_with("fn main() {") && first.len() > 20,
        "{first:?}"
    );
    assert_eq!(first, write(&[]), "the same seed gives the same text");
    assert_ne!(first, write(&["--seed", "1"]));
    // The run's folder is enough, without the data.
    std::fs::remove_dir_all(experiment.path("data")).unwrap();
    assert_eq!(first, write(&[]));
}

#[test]
fn a_finished_run_says_so_and_changes_nothing() {
    let experiment = Experiment::new();
    assert!(
        finish(&mut experiment.train(1, &["train.steps=5", "parallel.expert=1"]))
            .status
            .success()
    );
    let before = curve(&experiment, "run");
    let again = finish(&mut experiment.train(1, &["train.steps=5", "parallel.expert=1"]));
    assert!(
        again.status.success() && text(&again).contains("all 5 steps are done"),
        "{}",
        text(&again)
    );
    assert_eq!(before, curve(&experiment, "run"));
    assert_eq!(again.status.signal(), None);
}
