//! Checkpoints that are damaged, copied in part, hostile or in the way: they are refused by name,
//! set aside, and never overwritten or counted.

use crate::fixture::{Experiment, curve, finish, steps_done, text};
use serde_json::{Value, json};
use std::{
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Command,
};

const WITHOUT_KEEPERS: &str = "snapshot.every=0";

/// Trains to step `steps`, with a checkpoint every 5 steps.
fn trained(steps: u64) -> Experiment {
    let experiment = Experiment::new();
    succeed(&mut experiment.train(2, &[&format!("train.steps={steps}"), WITHOUT_KEEPERS]));
    experiment
}

fn succeed(command: &mut Command) -> String {
    let output = finish(command);
    assert!(output.status.success(), "{}", text(&output));
    text(&output)
}

/// Runs a command that fails, and checks that its output has all of `parts`.
fn refused(command: &mut Command, parts: &[&str]) {
    let output = finish(command);
    let said = text(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    for part in parts {
        assert!(said.contains(part), "{part:?} is not in:\n{said}");
    }
}

fn checkpoint(experiment: &Experiment, step: u64) -> PathBuf {
    experiment.path(&format!("run/checkpoints/step-{step:08}"))
}

/// Returns the names in the folder of checkpoints, without their leading zeros.
fn names(experiment: &Experiment) -> Vec<String> {
    let entries = std::fs::read_dir(experiment.path("run/checkpoints")).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .map(|name| name.replace("step-000000", ""))
        .collect();
    names.sort();
    names
}

fn manifest_of(checkpoint: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(checkpoint.join("manifest.json")).unwrap()).unwrap()
}

fn write_manifest(checkpoint: &Path, manifest: &Value) {
    std::fs::write(checkpoint.join("manifest.json"), manifest.to_string()).unwrap();
}

/// Changes a manifest as an earlier version would have written it, without a checksum.
fn rewrite(checkpoint: &Path, good: &Value, change: impl FnOnce(&mut Value)) {
    let mut manifest = good.clone();
    manifest.as_object_mut().unwrap().remove("crc32c").unwrap();
    change(&mut manifest);
    write_manifest(checkpoint, &manifest);
}

/// Flips one bit in the middle of a file.
fn flip_bit(file: &Path) {
    let mut bytes = std::fs::read(file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(file, bytes).unwrap();
}

fn generate(experiment: &Experiment, checkpoint: &str) -> Command {
    let args = [
        "generate",
        "--checkpoint",
        checkpoint,
        "--prompt",
        "fn",
        "--max-tokens",
        "4",
    ];
    experiment.moerun(&args)
}

/// sec-01: each of these left weights at random values, or moved the run, without a message.
#[test]
fn a_changed_manifest_is_refused_by_name() {
    let experiment = trained(10);
    std::fs::remove_dir_all(checkpoint(&experiment, 5)).unwrap();
    let newest = checkpoint(&experiment, 10);
    let good = manifest_of(&newest);
    // Another tool may write the same contents in another form.
    write_manifest(&newest, &good);
    succeed(&mut generate(&experiment, "run"));
    type Change = fn(&mut Value);
    let changes: [(Change, &str); 8] = [
        (
            |m| m["tensors"]["model/head"]["pieces"][0]["offset"][0] = json!(1),
            "model/head has",
        ),
        (
            |m| m["tensors"]["model/head"]["pieces"] = json!([]),
            "model/head is incomplete",
        ),
        (
            |m| m["tensors"]["model/head"]["pieces"][0]["shape"] = json!([-512, 32]),
            "not inside",
        ),
        (
            |m| m["tensors"]["model/head"]["pieces"][0]["file"] = json!(8),
            "shard 8",
        ),
        (|m| m["state"]["samples"] = json!(88), "do not agree"),
        (|m| m["state"]["step"] = json!(4), "its state is of step 4"),
        (
            |m| m["state"]["config"]["model"]["hidden"] = json!(64),
            "model.hidden is 64",
        ),
        (
            |m| m["step"] = json!(4),
            "it is of step 4, its folder of step 10",
        ),
    ];
    for (change, reason) in changes {
        let mut changed = good.clone();
        change(&mut changed);
        write_manifest(&newest, &changed);
        let parts = ["step-00000010/manifest.json is damaged: its checksum is"];
        refused(&mut generate(&experiment, "run"), &parts);
        // Without the checksum, the contradiction itself is found.
        rewrite(&newest, &good, change);
        refused(
            &mut generate(&experiment, "run"),
            &["step-00000010", reason],
        );
        let resume = ["train.steps=13", WITHOUT_KEEPERS];
        refused(
            &mut experiment.train(2, &resume),
            &["step-00000010", reason],
        );
        assert_eq!(manifest_of(&newest), {
            let mut expected = good.clone();
            expected.as_object_mut().unwrap().remove("crc32c");
            change(&mut expected);
            expected
        });
    }
    // One of an earlier version is read, and reported.
    rewrite(&newest, &good, |_| ());
    let said = succeed(&mut generate(&experiment, "run"));
    assert!(
        said.contains("warning: ") && said.contains("has no checksum"),
        "{said}"
    );
    let said = succeed(&mut experiment.train(2, &["train.steps=12", WITHOUT_KEEPERS]));
    assert_eq!(said.matches("has no checksum").count(), 1, "{said}");
    let manifest = manifest_of(&checkpoint(&experiment, 12));
    assert!(manifest["crc32c"].is_u64());
}

/// A single flipped bit of a manifest, and an older checkpoint that is whole.
#[test]
fn a_flipped_bit_in_a_manifest_sets_the_checkpoint_aside() {
    let experiment = trained(10);
    flip_bit(&checkpoint(&experiment, 10).join("manifest.json"));
    let said = succeed(&mut generate(&experiment, "run"));
    assert!(said.contains("warning: ") && said.contains("; using run/checkpoints/step-00000005"));
    assert_eq!(
        names(&experiment),
        ["05", "10"],
        "generating changes nothing"
    );
    let said = succeed(&mut experiment.train(2, &["train.steps=12", WITHOUT_KEEPERS]));
    assert!(said.contains("step-00000010 is refused"), "{said}");
    assert!(said.contains("step-00000010.damaged"), "{said}");
    assert!(
        said.contains("resuming from the checkpoint of step 5"),
        "{said}"
    );
    assert_eq!(names(&experiment), ["05", "10", "10.damaged", "12"]);
    // The run has its own step 10 now, which is whole.
    let again = succeed(&mut experiment.train(2, &["train.steps=13", WITHOUT_KEEPERS]));
    assert!(
        again.contains("resuming from the checkpoint of step 12"),
        "{again}"
    );
    assert!(!again.contains("refused"), "{again}");
}

/// sec-08: a manifest names files that are none of the checkpoint's.
#[test]
fn a_manifest_names_only_regular_files_of_its_folder() {
    let experiment = trained(5);
    let folder = checkpoint(&experiment, 5);
    let good = manifest_of(&folder);
    let shard = folder.join("shard-00000.safetensors");
    let outside = experiment.path("outside");
    std::fs::copy(&shard, &outside).unwrap();
    let path = "run/checkpoints/step-00000005";
    for name in [
        "/dev/zero",
        "../../../outside",
        outside.to_str().unwrap(),
        "..",
        "a/b",
        "manifest.json",
    ] {
        rewrite(&folder, &good, |manifest| {
            manifest["files"][0]["name"] = json!(name)
        });
        let parts = [path, &format!("{name:?} is no name of a shard")];
        refused(&mut generate(&experiment, path), &parts);
    }
    rewrite(&folder, &good, |manifest| {
        let files = manifest["files"].as_array_mut().unwrap();
        files.push(json!({"name": "pipe", "bytes": 0, "crc32c": 0}));
    });
    let pipe = Command::new("mkfifo").arg(folder.join("pipe")).status();
    assert!(pipe.unwrap().success());
    refused(
        &mut generate(&experiment, path),
        &["step-00000005/pipe: it is a pipe"],
    );
    refused(
        &mut experiment.train(2, &["train.steps=8", WITHOUT_KEEPERS]),
        &["step-00000005/pipe: it is a pipe"],
    );
    write_manifest(&folder, &good);
    std::fs::remove_file(&shard).unwrap();
    symlink(&outside, &shard).unwrap();
    refused(
        &mut generate(&experiment, path),
        &["shard-00000.safetensors: it is a symbolic link"],
    );
    // A manifest that is a link, a pipe or a folder.
    let manifest = folder.join("manifest.json");
    std::fs::rename(&manifest, experiment.path("manifest")).unwrap();
    symlink(experiment.path("manifest"), &manifest).unwrap();
    refused(
        &mut generate(&experiment, path),
        &["manifest.json: it is a symbolic link"],
    );
    std::fs::remove_file(&manifest).unwrap();
    assert!(
        Command::new("mkfifo")
            .arg(&manifest)
            .status()
            .unwrap()
            .success()
    );
    refused(
        &mut generate(&experiment, path),
        &["manifest.json: it is a pipe"],
    );
}

/// sec-09: the only checkpoint was copied in part.
#[test]
fn a_partial_copy_is_reported_and_not_overwritten() {
    let experiment = trained(10);
    std::fs::remove_dir_all(checkpoint(&experiment, 5)).unwrap();
    let newest = checkpoint(&experiment, 10);
    let manifest = newest.join("manifest.json");
    let good = std::fs::read(&manifest).unwrap();
    let losses = curve(&experiment, "run");
    std::fs::remove_file(&manifest).unwrap();
    let partial = "checkpoints/step-00000010 has shards and no manifest.json: copied in part? move \
                   it away to begin again";
    for changes in [
        ["train.steps=13", WITHOUT_KEEPERS],
        ["train.steps=13", "snapshot.every=5"],
    ] {
        refused(&mut experiment.train(2, &changes), &[partial]);
        assert_eq!(names(&experiment), ["10"]);
        assert_eq!(curve(&experiment, "run"), losses);
    }
    refused(&mut generate(&experiment, "run"), &[partial]);
    refused(
        &mut generate(&experiment, "run/checkpoints/step-00000010"),
        &[partial],
    );
    // The other way round: the manifest came first.
    std::fs::write(&manifest, &good).unwrap();
    let shard = newest.join("shard-00001.safetensors");
    let bytes = std::fs::read(&shard).unwrap();
    std::fs::remove_file(&shard).unwrap();
    let missing = "shard-00001.safetensors is damaged: it is missing";
    refused(
        &mut experiment.train(2, &["train.steps=13", WITHOUT_KEEPERS]),
        &[missing],
    );
    // When the copy is complete, the run resumes.
    std::fs::write(&shard, bytes).unwrap();
    let said = succeed(&mut experiment.train(2, &["train.steps=13", WITHOUT_KEEPERS]));
    assert!(
        said.contains("resuming from the checkpoint of step 10"),
        "{said}"
    );
}

/// All that is left was set aside: to begin again would be to lose the run silently.
#[test]
fn a_folder_of_damaged_checkpoints_is_no_new_run() {
    let experiment = trained(5);
    let newest = checkpoint(&experiment, 5);
    std::fs::rename(&newest, newest.with_extension("damaged")).unwrap();
    refused(
        &mut experiment.train(2, &["train.steps=8", WITHOUT_KEEPERS]),
        &[
            "step-00000005.damaged is damaged",
            "move the folder away to start from the beginning",
        ],
    );
    assert_eq!(names(&experiment), ["05.damaged"]);
}

/// A partial copy that is newer than a whole checkpoint.
#[test]
fn a_partial_copy_is_set_aside_for_an_older_checkpoint() {
    let experiment = trained(10);
    std::fs::remove_file(checkpoint(&experiment, 10).join("manifest.json")).unwrap();
    let said = succeed(&mut experiment.train(2, &["train.steps=11", WITHOUT_KEEPERS]));
    assert!(said.contains("copied in part?"), "{said}");
    assert!(
        said.contains("resuming from the checkpoint of step 5"),
        "{said}"
    );
    assert_eq!(names(&experiment), ["05", "10", "10.damaged", "11"]);
}

/// The checkpoint of another user, in a folder that this user may not enter.
#[test]
fn a_folder_that_cannot_be_entered_is_an_error() {
    let experiment = trained(10);
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: only root can become another user");
        return;
    }
    let unprivileged = |mut command: Command| {
        let mut inside = Command::new("setpriv");
        inside.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
        inside.arg(command.get_program()).args(command.get_args());
        inside.current_dir(experiment.path("."));
        command.env_remove("RANK");
        inside
    };
    let open_to_all = |path: &Path| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777)).unwrap();
    };
    open_to_all(&experiment.path("."));
    open_to_all(&experiment.path("run"));
    let whole = finish(&mut unprivileged(generate(&experiment, "run")));
    if !whole.status.success() {
        eprintln!(
            "skipped: another user cannot run moerun here: {}",
            text(&whole)
        );
        return;
    }
    let closed = |path: &Path| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700)).unwrap();
    };
    let denied = |what: &str| {
        let parts = ["Permission denied", what];
        refused(&mut unprivileged(generate(&experiment, "run")), &parts);
        let train = experiment.train(2, &["train.steps=13", WITHOUT_KEEPERS]);
        refused(&mut unprivileged(train), &parts);
    };
    closed(&checkpoint(&experiment, 10));
    denied("step-00000010");
    closed(&experiment.path("run/checkpoints"));
    denied("run/checkpoints");
    assert_eq!(names(&experiment), ["05", "10"]);
}

/// fault-09: a damaged checkpoint with a high number made `checkpoint.keep` delete every good one.
#[test]
fn a_damaged_checkpoint_never_makes_good_ones_go() {
    for snapshots in [WITHOUT_KEEPERS, "snapshot.every=5"] {
        let experiment = Experiment::new();
        let first = ["train.steps=20", "checkpoint.every=10", snapshots];
        succeed(&mut experiment.train(2, &first));
        let shard = checkpoint(&experiment, 20).join("shard-00000.safetensors");
        flip_bit(&shard);
        let more = [
            "train.steps=18",
            "checkpoint.every=5",
            "checkpoint.keep=1",
            snapshots,
        ];
        let said = succeed(&mut experiment.train(2, &more));
        assert!(said.contains("step-00000020 is refused"), "{said}");
        assert!(
            said.contains("resuming from the checkpoint of step 10"),
            "{said}"
        );
        assert_eq!(names(&experiment), ["18", "20.damaged"], "{said}");
        let last = "checkpoint run/checkpoints/step-00000018";
        assert!(
            said.contains(last) && !said.contains("checkpoint run/checkpoints/step-00000020\n")
        );
        let again = succeed(&mut experiment.train(2, &more));
        assert!(again.contains("all 18 steps are done"), "{again}");
        succeed(&mut generate(&experiment, "run"));
    }
}

/// A checkpoint of a newer version is refused, but it is not damaged: it stays, and does not count.
#[test]
fn a_newer_formats_checkpoint_stays_and_does_not_count() {
    let experiment = trained(10);
    let newest = checkpoint(&experiment, 10);
    let good = manifest_of(&newest);
    rewrite(&newest, &good, |manifest| manifest["format"] = json!(4));
    let more = ["train.steps=8", "checkpoint.keep=1", WITHOUT_KEEPERS];
    let said = succeed(&mut experiment.train(2, &more));
    assert!(said.contains("format 4 is newer than 3"), "{said}");
    assert_eq!(names(&experiment), ["08", "10"]);
    // A run that reaches its step does not overwrite it.
    let more = ["train.steps=10", "checkpoint.keep=1", WITHOUT_KEEPERS];
    succeed(&mut experiment.train(2, &more));
    assert_eq!(names(&experiment), ["10", "10.damaged"]);
    assert_eq!(manifest_of(&newest.with_extension("damaged"))["format"], 4);
}

/// fault-23 b: what a crash left of a checkpoint is never written again by itself.
#[test]
fn unfinished_checkpoints_are_removed_at_the_start() {
    for snapshots in [WITHOUT_KEEPERS, "snapshot.every=5"] {
        let experiment = Experiment::new();
        let outside = experiment.path("outside");
        std::fs::create_dir(&outside).unwrap();
        std::fs::write(outside.join("file"), "kept").unwrap();
        let writing = checkpoint(&experiment, 77).with_extension("writing");
        std::fs::create_dir_all(&writing).unwrap();
        std::fs::write(writing.join("shard-00000.safetensors"), vec![0; 3_000_000]).unwrap();
        symlink(
            &outside,
            checkpoint(&experiment, 78).with_extension("writing"),
        )
        .unwrap();
        std::fs::create_dir(checkpoint(&experiment, 79).with_extension("removing")).unwrap();
        let said = succeed(&mut experiment.train(2, &["train.steps=5", snapshots]));
        assert!(said.contains("step-00000077.writing (3.0 MB)"), "{said}");
        assert_eq!(names(&experiment), ["05"]);
        assert_eq!(
            std::fs::read_to_string(outside.join("file")).unwrap(),
            "kept"
        );
    }
}

/// A link in place of the folder of checkpoints, of a checkpoint, or of one being written.
#[test]
fn nothing_is_written_or_removed_through_a_link() {
    for snapshots in [WITHOUT_KEEPERS, "snapshot.every=5"] {
        let experiment = Experiment::new();
        let outside = experiment.path("outside");
        std::fs::create_dir(&outside).unwrap();
        std::fs::create_dir(experiment.path("run")).unwrap();
        symlink(&outside, experiment.path("run/checkpoints")).unwrap();
        let changes = ["train.steps=5", snapshots];
        let parts = ["run/checkpoints: it is a symbolic link"];
        refused(&mut experiment.train(2, &changes), &parts);
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
        assert_eq!(steps_done(&experiment, "run"), 0);

        std::fs::remove_file(experiment.path("run/checkpoints")).unwrap();
        std::fs::create_dir(experiment.path("run/checkpoints")).unwrap();
        let precious = outside.join("manifest.json");
        std::fs::write(&precious, "kept").unwrap();
        symlink(&outside, checkpoint(&experiment, 10)).unwrap();
        // It is refused, and replaced when the run writes that step.
        refused(
            &mut experiment.train(2, &["train.steps=10", snapshots]),
            &["step-00000010"],
        );
        std::fs::remove_file(checkpoint(&experiment, 10)).unwrap();
        succeed(&mut experiment.train(2, &["train.steps=5", snapshots]));
        symlink(&outside, checkpoint(&experiment, 10)).unwrap();
        let keep = ["train.steps=15", "checkpoint.keep=1", snapshots];
        succeed(&mut experiment.train(2, &keep));
        assert_eq!(std::fs::read_to_string(&precious).unwrap(), "kept");
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 1);
    }
}

/// The positions of a run whose batch changed, twice, still agree.
#[test]
fn a_run_whose_batch_changes_resumes() {
    let experiment = trained(5);
    let batches = [
        "8",
        "16",
        "[{tokens: 0, sequences: 8}, {tokens: 4000, sequences: 16}]",
        "8",
    ];
    for (number, batch) in batches.iter().enumerate() {
        let steps = format!("train.steps={}", 8 + 3 * number);
        let batch = format!("train.global_batch={batch}");
        succeed(&mut experiment.train(2, &[&steps, &batch, WITHOUT_KEEPERS]));
    }
    assert_eq!(steps_done(&experiment, "run"), 17);
}
