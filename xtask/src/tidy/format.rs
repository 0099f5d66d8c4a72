//! Code is formatted by rustfmt's defaults at 100 columns.

use super::report::Report;
use crate::tree::Tree;
use anyhow::{Context, Result};
use std::process::Command;

const CONFIG: &str = "rustfmt.toml";

pub(super) fn check(tree: &Tree, report: &mut Report) -> Result<()> {
    check_config(tree, report);
    let mut fmt = Command::new("cargo");
    fmt.current_dir(&tree.root)
        .args(["fmt", "--all", "--check"]);
    let output = fmt.output().context("cargo fmt")?;
    let found = report.problems.len();
    let root = format!("{}/", tree.root.display());
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        if let Some(place) = place(line) {
            let path = place.path.strip_prefix(&root).unwrap_or(place.path);
            report.problem(path, place.line, "not formatted: run `cargo x fix`");
        }
    }
    if !output.status.success() && report.problems.len() == found {
        let message = String::from_utf8_lossy(&output.stderr);
        report.problem(
            CONFIG,
            1,
            format!("cargo fmt failed: {}", message.trim_end()),
        );
    }
    Ok(())
}

fn check_config(tree: &Tree, report: &mut Report) {
    let text = tree.file(CONFIG).map_or("", |file| &file.text);
    let is_setting = |line: &&str| !line.is_empty() && !line.starts_with('#');
    let settings: Vec<&str> = text.lines().map(str::trim).filter(is_setting).collect();
    if settings != ["max_width = 100"] {
        report.problem(CONFIG, 1, "must be `max_width = 100` and nothing else");
    }
}

struct Place<'a> {
    path: &'a str,
    line: usize,
}

/// Reads a line like `Diff in /moerun/kernels/src/lib.rs:12:` of rustfmt's output.
fn place(line: &str) -> Option<Place<'_>> {
    let text = line.strip_prefix("Diff in ")?.strip_suffix(':')?;
    let (path, number) = text.rsplit_once(':')?;
    let line = number.parse().ok()?;
    Some(Place { path, line })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_have_a_place() {
        let found = place("Diff in /a/b.rs:12:").unwrap();
        assert_eq!((found.path, found.line), ("/a/b.rs", 12));
        assert!(place("+ let x = 1;").is_none());
    }

    #[test]
    fn other_settings_are_refused() {
        let problems = |text| {
            let mut report = Report::default();
            check_config(&Tree::of(&[(CONFIG, text)]), &mut report);
            report.problems.len()
        };
        assert_eq!(
            problems("max_width = 120\nuse_small_heuristics = \"Max\"\n"),
            1
        );
        assert_eq!(problems("# wide enough\nmax_width = 100\n"), 0);
    }
}
