//! Cargo commands, and how their failures are reported.

use crate::tree::Tree;
use anyhow::{Context, Result, bail};
use std::process::Command;

/// Returns a cargo command that works at the root of the project.
pub(crate) fn command(tree: &Tree, arguments: &[&str]) -> Command {
    let mut command = Command::new("cargo");
    command.current_dir(&tree.root).args(arguments);
    command
}

/// Prints a command and runs it.
///
/// # Errors
/// If the command cannot start, or fails.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let line = line(command);
    eprintln!("xtask: {line}");
    let status = command.status().with_context(|| line.clone())?;
    if !status.success() {
        bail!("{line}: {status}");
    }
    Ok(())
}

/// Returns a command as one would type it.
fn line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
    words.join(" ")
}
