//! Test programs, two at a time.
//!
//! `cargo test` runs one program after another, and most of what the slow ones do is wait.

use crate::failure::Failure;
use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::scope;

/// More would compete for the processors, on which some tests keep an eye.
const AT_A_TIME: usize = 2;

/// The programs that take longest, and so start first.
const SLOWEST: [&str; 5] = ["ranks", "parallel", "kernels", "dispatch", "keepers"];

/// A built test program.
#[derive(Debug)]
struct Program {
    name: String,
    file: PathBuf,
    /// The folder of its crate, in which tests run.
    folder: PathBuf,
}

/// Builds the programs of a `cargo test` command and runs them.
///
/// # Errors
/// If they cannot be built, or a test fails.
pub(crate) fn run(test: &mut Command) -> Result<()> {
    test.args(["--no-run", "--message-format=json-render-diagnostics"]);
    let output = test
        .stderr(Stdio::inherit())
        .output()
        .context("cargo test")?;
    ensure!(
        output.status.success(),
        "cargo test --no-run: {}",
        output.status
    );
    let messages = String::from_utf8_lossy(&output.stdout);
    let mut programs: Vec<Program> = messages.lines().filter_map(program).collect();
    let rank = |name: &str| SLOWEST.iter().position(|slow| *slow == name);
    programs.sort_by_key(|program| rank(&program.name).unwrap_or(SLOWEST.len()));
    let failed = run_all(&programs)?;
    if !failed.is_empty() {
        bail!(Failure::new(
            format!("tests failed in {}", failed.join(", ")),
            "repeat one with `cargo test --release --features mpi NAME`",
        ));
    }
    Ok(())
}

/// Reads a message of cargo, if it is about a test program.
fn program(message: &str) -> Option<Program> {
    let message: Value = serde_json::from_str(message).ok()?;
    let is_test = message["profile"]["test"] == true;
    let file = message["executable"].as_str().filter(|_| is_test)?;
    let manifest = Path::new(message["manifest_path"].as_str()?);
    Some(Program {
        name: message["target"]["name"].as_str()?.to_owned(),
        file: PathBuf::from(file),
        folder: manifest.parent()?.to_owned(),
    })
}

/// Runs all programs and returns the names of those that failed.
fn run_all(programs: &[Program]) -> Result<Vec<String>> {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut failed = Vec::new();
        while let Some(program) = programs.get(next.fetch_add(1, Ordering::Relaxed)) {
            if !program.passes()? {
                failed.push(program.name.clone());
            }
        }
        Ok(failed)
    };
    scope(|threads| {
        let workers: Vec<_> = (0..AT_A_TIME).map(|_| threads.spawn(work)).collect();
        let mut failed = Vec::new();
        for worker in workers {
            let found: Result<Vec<String>> =
                worker.join().map_err(|_| anyhow!("a thread panicked"))?;
            failed.extend(found?);
        }
        Ok(failed)
    })
}

impl Program {
    /// Runs the program, prints its output when it has ended, and returns true if it passed.
    fn passes(&self) -> Result<bool> {
        let mut command = Command::new(&self.file);
        command.current_dir(&self.folder);
        command.env("CARGO_MANIFEST_DIR", &self.folder);
        let output = command.output().with_context(|| self.name.clone())?;
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        println!("\ntests of {}:\n{}", self.name, said.trim());
        Ok(output.status.success())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_messages_about_test_programs_are_read() {
        let message = |test: bool| {
            serde_json::json!({
                "reason": "compiler-artifact",
                "manifest_path": "/moerun/moe/Cargo.toml",
                "target": {"name": "dispatch"},
                "profile": {"test": test},
                "executable": "/target/dispatch-1",
            })
        };
        let found = program(&message(true).to_string()).unwrap();
        assert_eq!(found.name, "dispatch");
        assert_eq!(found.folder, Path::new("/moerun/moe"));
        assert!(program(&message(false).to_string()).is_none());
        assert!(program("Compiling moe").is_none());
    }

    #[test]
    fn failed_programs_are_named() {
        let program = |name: &str| Program {
            name: name.to_owned(),
            file: PathBuf::from(name),
            folder: PathBuf::from("/"),
        };
        let programs = ["true", "false", "true"].map(program);
        assert_eq!(run_all(&programs).unwrap(), ["false"]);
    }
}
