//! Snapshots of what commands print. Values that depend on the machine are filtered.
//!
//! After a change of the output, `INSTA_UPDATE=always cargo test -p launch --test system cli`
//! writes the files in `tests/snapshots/` again.

use crate::fixture::{Experiment, finish, text};
use insta::{Settings, assert_snapshot};
use std::{fs::Permissions, os::unix::fs::PermissionsExt, path::Path, process::Command};

/// Returns a command and what it prints.
fn run(experiment: &Experiment, args: &[&str]) -> String {
    let mut command = experiment.moerun(args);
    command.env("NO_COLOR", "1").env_remove("CLICOLOR_FORCE");
    let output = finish(&mut command);
    let line = args.join(" ");
    let stdout = String::from_utf8(output.stdout).unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    let status = output.status;
    format!("$ moerun {line}\n{stdout}{stderr}[{status}]\n")
}

/// Asserts that a command prints the same as the snapshot `name`, after the filters.
fn assert_prints(name: &str, experiment: &Experiment, args: &[&str], filters: &[(&str, &str)]) {
    let mut settings = Settings::clone_current();
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    for (pattern, replacement) in filters {
        settings.add_filter(pattern, *replacement);
    }
    let printed = run(experiment, args);
    settings.bind(|| assert_snapshot!(name, printed));
}

#[test]
fn help_is_printed() {
    let experiment = Experiment::without_data();
    for (name, args) in [
        ("help", &["--help"][..]),
        ("help-train", &["train", "--help"]),
        ("help-plan", &["plan", "--help"]),
        ("help-bench", &["bench", "--help"]),
    ] {
        assert_prints(name, &experiment, args, &[]);
    }
}

#[test]
fn plans_are_printed() {
    let experiment = Experiment::without_data();
    let schedule = ["plan", "schedule", "1f1b", "-n", "2", "-m", "4"];
    assert_prints("plan-schedule", &experiment, &schedule, &[]);
    let mesh = ["plan", "mesh", "small.yaml", "-n", "4"];
    assert_prints("plan-mesh", &experiment, &mesh, &[]);
}

#[test]
fn a_checked_configuration_is_printed_with_its_defaults() {
    let experiment = Experiment::without_data();
    let project = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let smoke = project.join("configs/smoke.yaml");
    std::fs::copy(smoke, experiment.path("smoke.yaml")).unwrap();
    let check = ["config", "check", "smoke.yaml", "-n", "4"];
    assert_prints("config-check", &experiment, &check, &[]);
}

#[test]
fn an_unknown_key_is_reported_with_a_hint() {
    let experiment = Experiment::without_data();
    let text = std::fs::read_to_string(experiment.path("small.yaml")).unwrap();
    let text = text.replace("micro_batch", "mikro_batch");
    std::fs::write(experiment.path("typo.yaml"), text).unwrap();
    let check = ["config", "check", "typo.yaml"];
    assert_prints("unknown-key", &experiment, &check, &[]);
}

#[test]
fn a_missing_run_is_reported() {
    let experiment = Experiment::without_data();
    let status = ["snapshot", "status", "nowhere"];
    assert_prints("snapshot-status", &experiment, &status, &[]);
}

#[test]
fn the_findings_of_the_doctor_are_printed() {
    let experiment = Experiment::without_data();
    let filters = [
        // Checks that may only warn on a machine that passes the other tests.
        (
            r"(ok  |warn) (processors|GPU|MPI): .*(\n     fix: .*)?",
            "[ok or warn] $2: [detail]",
        ),
        (r"ok   NPU: .*\n", ""),
        (
            r"ok   (libtorch|memory|shared memory|open files): .*",
            "ok   $1: [detail]",
        ),
        (r"\d+\.\d+\.\d+", "[version]"),
        (r"at most \d+ ms", "at most [time] ms"),
        (
            r"in \d+\.\d+ ms \(\d+\.\d+ GB/s\)",
            "in [time] ms ([rate] GB/s)",
        ),
    ];
    assert_prints("doctor", &experiment, &["doctor", "-n", "2"], &filters);
}

#[test]
fn commands_about_data_become_a_program_of_their_own() {
    let experiment = Experiment::without_data();
    let moerun = experiment.path("moerun");
    std::fs::copy(env!("CARGO_BIN_EXE_moerun"), &moerun).unwrap();
    // Prints its arguments; the signals of `moerun-core` must not stay blocked in it.
    let program = experiment.path("moerun-data");
    let script = "#!/bin/sh\necho \"data: $*\"\ngrep SigBlk /proc/self/status\n";
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
    for (args, expected) in [
        (
            &["data", "prepare", "x"][..],
            "data: data prepare x\nSigBlk:\t0000000000000000",
        ),
        (
            &["bench", "data"],
            "data: bench data\nSigBlk:\t0000000000000000",
        ),
        // There is no core to run others.
        (&["bench", "step"], "moerun-core is missing"),
        (&["config", "data"], "moerun-core is missing"),
    ] {
        let output = finish(Command::new(&moerun).args(args));
        let printed = text(&output);
        assert!(printed.contains(expected), "{args:?}: {printed}");
    }
}
