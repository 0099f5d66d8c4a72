//! The reference pages and the schema are those that the program would write now.

use super::report::Report;
use crate::{reference::reference, tree::Tree};
use anyhow::{Context, Result};

pub(super) fn check(tree: &Tree, report: &mut Report) -> Result<()> {
    let mut check = reference(tree)?;
    let output = check.arg("--check").output().context("moerun-core")?;
    let said = [output.stdout, output.stderr].concat();
    judge(
        output.status.success(),
        &String::from_utf8_lossy(&said),
        report,
    );
    Ok(())
}

/// Passes on what the program says is stale.
fn judge(is_current: bool, said: &str, report: &mut Report) {
    if !is_current {
        let message = format!("stale: run `cargo x fix`\n{}", said.trim_end());
        report.problem("docs/reference", 1, message);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stale_files_are_named() {
        let mut report = Report::default();
        judge(true, "", &mut report);
        assert!(report.problems.is_empty());
        judge(false, "configs/schema.json\n", &mut report);
        let expected = "stale: run `cargo x fix`\nconfigs/schema.json";
        assert_eq!(report.problems[0].message, expected);
    }
}
