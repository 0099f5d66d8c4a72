//! The files in configs/ and docs/reference/: all can run, or are those that the program generates.

use crate::fixture::Experiment;
use std::{
    path::{Path, PathBuf},
    process::Command,
};

fn project() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn moerun(args: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_moerun"))
        .args(args)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// The number of ranks in the first lines of a configuration.
fn ranks(name: &str) -> &'static str {
    match name {
        "smoke.yaml" => "4",
        "olmoe-1b-7b.yaml" => "64",
        "powermoe-3b.yaml" => "32",
        other => panic!("add the number of ranks of {other}"),
    }
}

#[test]
fn every_configuration_can_run_and_so_can_its_printed_form() {
    let experiment = Experiment::new();
    // The data of these files need not be here.
    let data = |name: &str| {
        let path = experiment.path("data/train");
        format!("data.{name}=[{{path: {}}}]", path.display())
    };
    let train = data("train");
    let validation = data("validation");
    let check = |path: &Path, ranks: &str| {
        let path = path.to_str().unwrap();
        let data = ["--set", train.as_str(), "--set", validation.as_str()];
        moerun(&[&["config", "check", path, "-n", ranks][..], &data[..]].concat())
    };
    let mut checked = 0;
    for entry in std::fs::read_dir(project().join("configs")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "yaml") {
            continue;
        }
        let ranks = ranks(path.file_name().unwrap().to_str().unwrap());
        let printed = check(&path, ranks);
        let again = experiment.path("printed.yaml");
        std::fs::write(&again, &printed).unwrap();
        let reprinted = check(&again, ranks);
        let body = |text: &str| text.split_once('\n').unwrap().1.to_string();
        assert_eq!(body(&printed), body(&reprinted));
        checked += 1;
    }
    assert!(checked >= 3);
}

#[test]
fn the_reference_and_the_schema_are_current() {
    let check = Command::new(env!("CARGO_BIN_EXE_moerun"))
        .current_dir(project())
        .args(["reference", "--check"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&check.stderr);
    assert!(check.status.success(), "{said}");

    let schema = std::fs::read_to_string(project().join("configs/schema.json")).unwrap();
    assert_eq!(schema, moerun(&["config", "schema"]));
}

#[test]
fn stale_pages_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let reference = |options: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_moerun"))
            .current_dir(folder.path())
            .arg("reference")
            .args(options)
            .output()
            .unwrap()
    };
    assert!(reference(&[]).status.success());
    assert!(reference(&["--check"]).status.success());
    let page = folder.path().join("docs/reference/metrics.md");
    std::fs::write(page, "old").unwrap();
    let check = reference(&["--check"]);
    assert_eq!(check.status.code(), Some(1));
    assert_eq!(
        String::from_utf8_lossy(&check.stderr),
        "error: docs/reference/metrics.md is stale\nhint: cargo x fix\n"
    );
}
