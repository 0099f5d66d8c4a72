//! Cargo commands, and how their failures are reported.

use crate::tree::Tree;
use anyhow::{Context, Result, bail};
use std::process::Command;

/// Returns a cargo command that works at the root of the project, with the versions of Cargo.lock.
pub(crate) fn command(tree: &Tree, arguments: &[&str]) -> Command {
    let mut command = Command::new("cargo");
    command.current_dir(&tree.root).args(arguments);
    if arguments.first() != Some(&"fmt") {
        command.arg("--locked");
    }
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    /// Subcommands that would otherwise update Cargo.lock.
    const RESOLVING: [&str; 6] = ["build", "test", "clippy", "run", "check", "doc"];

    #[test]
    fn scripts_build_with_the_versions_of_the_lock_file() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let scripts = std::fs::read_dir(root.join("scripts")).unwrap();
        let mut files: Vec<_> = scripts.map(|entry| entry.unwrap().path()).collect();
        files.push(root.join(".ci/run"));
        let mut found = 0;
        for file in files.into_iter().filter(|file| file.is_file()) {
            let text = std::fs::read_to_string(&file).unwrap();
            for line in text
                .lines()
                .filter(|line| !line.trim_start().starts_with('#'))
            {
                let Some((_, command)) = line.split_once("cargo ") else {
                    continue;
                };
                if RESOLVING
                    .iter()
                    .any(|name| command.starts_with(&format!("{name} ")))
                {
                    found += 1;
                    assert!(line.contains("--locked"), "{}: {line}", file.display());
                }
            }
        }
        assert!(found >= 6, "{found}");
    }
}
