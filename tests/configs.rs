//! Every configuration in configs/ can run, and the schema beside them is the one the code has.

use std::path::Path;
use std::process::Command;

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

/// The ranks each configuration says it is for.
fn ranks(name: &str) -> &'static str {
    match name {
        "smoke.yaml" => "4",
        "olmoe-1b-7b.yaml" => "64",
        "powermoe-3b.yaml" => "32",
        other => panic!("say how many ranks {other} is for"),
    }
}

#[test]
fn every_configuration_is_fine_and_so_is_its_printed_form() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs");
    let scratch = tempfile::tempdir().unwrap();
    let mut checked = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "yaml") {
            continue;
        }
        let ranks = ranks(path.file_name().unwrap().to_str().unwrap());
        let printed = moerun(&["config", "check", path.to_str().unwrap(), "-n", ranks]);
        let again = scratch.path().join("printed.yaml");
        std::fs::write(&again, &printed).unwrap();
        let reprinted = moerun(&["config", "check", again.to_str().unwrap(), "-n", ranks]);
        let body = |text: &str| text.split_once('\n').unwrap().1.to_string();
        assert_eq!(body(&printed), body(&reprinted));
        checked += 1;
    }
    assert!(checked >= 3);
}

#[test]
fn the_schema_is_current() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/schema.json");
    let kept = std::fs::read_to_string(path).unwrap();
    assert!(
        kept == moerun(&["config", "schema"]),
        "run: moerun config schema > configs/schema.json"
    );
}
