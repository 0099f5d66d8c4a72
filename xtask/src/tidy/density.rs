//! Words per line of Rust: at most 3.2 over all, and 3.5 in a crate.
//!
//! A word is a run of letters, digits and `_` outside comments and strings; numbers are no words. A
//! line counts if it is neither blank nor only a comment.

use super::report::Report;
use crate::{
    lexer::{Kind, Word, code_words, pieces},
    tree::{Language, Tree},
};
use anyhow::Result;
use std::collections::{BTreeMap, BTreeSet};

const OVER_ALL: f64 = 3.2;
const IN_A_CRATE: f64 = 3.5;

pub(super) fn check(tree: &Tree, report: &mut Report) -> Result<()> {
    let mut crates: BTreeMap<&str, Density> = BTreeMap::new();
    let mut all = Density::default();
    for file in tree.written_in(Language::Rust) {
        let density = Density::of(&file.text);
        crates.entry(file.top_folder()).or_default().add(density);
        all.add(density);
    }
    report.note(format!(
        "{:<12} {:>7} {:>7} {:>6}",
        "density", "words", "lines", "ratio"
    ));
    for (name, density) in &crates {
        report.note(density.row(name));
        density.judge(name, IN_A_CRATE, report);
    }
    report.note(all.row("all"));
    all.judge(".", OVER_ALL, report);
    Ok(())
}

#[derive(Clone, Copy, Default)]
struct Density {
    words: usize,
    lines: usize,
}

impl Density {
    fn of(source: &str) -> Density {
        let mut lines = BTreeSet::new();
        for piece in pieces(source)
            .iter()
            .filter(|piece| piece.kind != Kind::Comment)
        {
            let texts = piece.text.split('\n').enumerate();
            let filled = texts.filter(|(_, text)| !text.trim().is_empty());
            lines.extend(filled.map(|(index, _)| piece.line + index));
        }
        let words = code_words(source).into_iter().filter(Word::is_identifier);
        Density {
            words: words.count(),
            lines: lines.len(),
        }
    }

    fn add(&mut self, other: Density) {
        self.words += other.words;
        self.lines += other.lines;
    }

    fn ratio(self) -> f64 {
        self.words as f64 / self.lines.max(1) as f64
    }

    fn row(self, name: &str) -> String {
        let Density { words, lines } = self;
        format!("{name:<12} {words:>7} {lines:>7} {:>6.2}", self.ratio())
    }

    fn judge(self, path: &str, limit: f64, report: &mut Report) {
        let ratio = self.ratio();
        if ratio > limit {
            let message = format!("{ratio:.2} words per line: at most {limit}; split statements");
            report.problem(path, 1, message);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::{problems, problems_in};

    #[test]
    fn comments_strings_and_blank_lines_do_not_count() {
        let density = Density::of("// a b c\n\nlet x = \"a b\n c\"; // d\n/* e */\n}\n");
        assert_eq!((density.words, density.lines), (2, 3));
    }

    #[test]
    fn dense_crates_are_found() {
        let dense = "let a = b + c;\n";
        let expected = "1: 4.00 words per line: at most 3.5; split statements";
        assert_eq!(problems_in("moe/src/lib.rs", dense, "density")[0], expected);
    }

    #[test]
    fn a_crate_may_be_denser_than_the_whole() {
        let tree = Tree::of(&[
            ("moe/src/lib.rs", "a b c d\na b c\n"),
            ("launch/src/main.rs", "a b\na b\n"),
        ]);
        assert!(problems(&tree, "density").is_empty());
    }
}
