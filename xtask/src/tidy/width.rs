//! No line over 100 columns.
//!
//! Markdown may be wider in tables, code blocks and lines with a URL, none of which can be broken.

use super::report::Report;
use crate::tree::{File, Language};

const COLUMNS: usize = 100;

pub(super) fn check(file: &File, report: &mut Report) {
    if file.is_generated() || file.language == Language::Other {
        return;
    }
    let mut in_code_block = false;
    for (number, line) in file.lines() {
        if file.language == Language::Markdown {
            let fence = line.trim_start().starts_with("```");
            in_code_block ^= fence;
            if fence || in_code_block || line.starts_with('|') || line.contains("://") {
                continue;
            }
        }
        let columns = line.chars().count();
        if columns > COLUMNS {
            let message = format!("{columns} columns: break the line at {COLUMNS}");
            report.problem(&file.path, number, message);
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::tidy::problems_in;

    #[test]
    fn columns_are_characters() {
        let long = format!("fits\n{}", "ä".repeat(101));
        let expected = ["2: 101 columns: break the line at 100"];
        assert_eq!(problems_in("a.py", &long, "width"), expected);
        assert!(problems_in("a.rs", &"ä".repeat(100), "width").is_empty());
    }

    #[test]
    fn markdown_may_be_wide_where_it_cannot_be_broken() {
        let wide = "x".repeat(101);
        let fine = format!("| {wide} |\n```\n{wide}\n```\n[a](https://{wide})\n");
        assert!(problems_in("a.md", &fine, "width").is_empty());
        assert_eq!(
            problems_in("a.md", &format!("```\n```\n{wide}"), "width").len(),
            1
        );
    }

    #[test]
    fn generated_files_pass() {
        let wide = "x".repeat(101);
        assert!(problems_in("docs/reference/a.md", &wide, "width").is_empty());
        assert!(problems_in("tests/snapshots/a.snap", &wide, "width").is_empty());
    }
}
