//! The test suites. Together they run every test that `scripts/test` runs, each once.
//!
//! - `fast`: unit tests, doc tests and the integration tests in the folders of the crates. None
//!   starts a rank, a keeper or a launcher as a process; some compile a kernel with `c++`.
//! - `layouts`: the modules of `tests/main.rs` that compare parallel layouts with one rank.
//! - `system`: the other modules of `tests/main.rs`.
//!
//! All build with the profile and features of `scripts/test`, so that one build serves them.

use crate::{
    cargo,
    failure::Failure,
    programs,
    tree::{Language, Tree},
};
use anyhow::{Context, Result, ensure};
use std::process::Command;

/// The arguments of `cargo test` in `scripts/test`.
const ALL_TESTS: [&str; 5] = ["--locked", "--release", "--workspace", "--features", "mpi"];

/// The target of the tests that start processes.
const SYSTEM_TARGET: &str = "system";

/// Runs the tests that start no process of moerun.
///
/// # Errors
/// If a test fails, or MPI is not set up.
pub(crate) fn fast(tree: &Tree, extra: &[String]) -> Result<()> {
    let mut targets = vec!["--lib".to_owned(), "--bins".to_owned()];
    for target in integration_tests(tree) {
        targets.extend(["--test".to_owned(), target.to_owned()]);
    }
    // With arguments of its own a run is about few tests, and cargo shows them as they run.
    if extra.is_empty() {
        programs::run(&mut test(tree, &targets)?)?;
    } else {
        cargo::run(test(tree, &targets)?.args(extra))?;
    }
    cargo::run(test(tree, &["--doc".to_owned()])?.args(extra))
}

/// Runs the tests of parallel layouts.
///
/// # Errors
/// If a test fails, or MPI is not set up.
pub(crate) fn layouts(tree: &Tree, extra: &[String]) -> Result<()> {
    let others = system_modules(tree)?
        .into_iter()
        .filter(|module| !is_layouts(module));
    test_system_without(tree, &others.collect::<Vec<_>>(), extra)
}

/// Runs the whole-system tests, except those of parallel layouts.
///
/// # Errors
/// If a test fails, or MPI is not set up.
pub(crate) fn system(tree: &Tree, extra: &[String]) -> Result<()> {
    let layouts = system_modules(tree)?
        .into_iter()
        .filter(|module| is_layouts(module));
    test_system_without(tree, &layouts.collect::<Vec<_>>(), extra)
}

/// Runs the system tests of all modules but `skipped`.
fn test_system_without(tree: &Tree, skipped: &[&str], extra: &[String]) -> Result<()> {
    let targets = ["--test".to_owned(), SYSTEM_TARGET.to_owned()];
    let mut command = test(tree, &targets)?;
    command.args(extra);
    if !extra.iter().any(|argument| argument == "--") {
        command.arg("--");
    }
    command.args(skipped.iter().map(|module| format!("--skip={module}::")));
    cargo::run(&mut command)
}

/// Returns the command that builds these targets as `scripts/test` does, and runs their tests.
fn test(tree: &Tree, targets: &[String]) -> Result<Command> {
    ensure!(
        std::env::var_os("MPICC").is_some(),
        Failure::new("the tests need MPI", "run ./scripts/setup --mpi --nvrtc")
    );
    let mut command = cargo::command(tree, &["test"]);
    command.args(ALL_TESTS).args(targets);
    if std::env::var_os("RUST_BACKTRACE").is_none() {
        command.env("RUST_BACKTRACE", "0");
    }
    Ok(command)
}

fn is_layouts(module: &str) -> bool {
    module.ends_with("layouts")
}

/// Returns the integration tests in the folders of the crates.
fn integration_tests(tree: &Tree) -> Vec<&str> {
    let files = tree
        .written_in(Language::Rust)
        .map(|file| file.path.as_str());
    files.filter_map(integration_test).collect()
}

/// Returns the target of a file like `moe/tests/dispatch.rs`.
fn integration_test(path: &str) -> Option<&str> {
    let (folder, file) = path.split_once("/tests/")?;
    // Deeper in a crate such a folder has modules of its unit tests.
    let is_of_crate = !folder.contains('/');
    let name = file.strip_suffix(".rs")?;
    (is_of_crate && !name.contains('/')).then_some(name)
}

/// Returns the modules of the system tests.
fn system_modules(tree: &Tree) -> Result<Vec<&str>> {
    let main = tree
        .file("tests/main.rs")
        .context("tests/main.rs is missing")?;
    let module = |line| str::strip_prefix(line, "mod ")?.strip_suffix(';');
    Ok(main.text.lines().filter_map(module).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn project() -> Tree {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
        Tree::read(folder.parent().unwrap()).unwrap()
    }

    /// The tests of a target are all in one suite, or split by `--skip` and its complement.
    #[test]
    fn the_suites_share_out_all_tests() {
        let tree = project();
        let script = &tree.file("scripts/test").unwrap().text;
        let all = format!("cargo test {}", ALL_TESTS.join(" "));
        assert!(script.contains(&all), "scripts/test does not run `{all}`");

        for manifest in tree.written_in(Language::Toml) {
            let named = manifest.text.split("[[test]]\nname = \"").skip(1);
            let names: Vec<&str> = named.filter_map(|rest| rest.split('"').next()).collect();
            let expected: &[&str] = match manifest.path.as_str() {
                "launch/Cargo.toml" => &[SYSTEM_TARGET],
                _ => &[],
            };
            assert_eq!(names, expected, "no suite runs them: {}", manifest.path);
        }
        let fast = integration_tests(&tree);
        assert!(
            fast.contains(&"golden") && !fast.contains(&SYSTEM_TARGET),
            "{fast:?}"
        );
    }

    /// `--skip` compares parts of names, so no module may end like one of another suite.
    #[test]
    fn the_system_suites_skip_no_module_of_their_own() {
        let tree = project();
        let modules = system_modules(&tree).unwrap();
        let layouts: Vec<&str> = modules
            .iter()
            .copied()
            .filter(|name| is_layouts(name))
            .collect();
        assert_eq!(layouts, ["drawn_layouts", "layouts"]);
        for name in modules {
            for other in system_modules(&tree).unwrap() {
                let is_skipped = is_layouts(name) != is_layouts(other) && name.ends_with(other);
                assert!(!is_skipped, "skipping {other} would skip {name}");
            }
        }
    }
}
