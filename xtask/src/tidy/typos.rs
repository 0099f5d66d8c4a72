//! No misspelling that the typos project knows, in names, comments and text.
//!
//! `xtask/typos.txt` lists words and identifiers that are right nevertheless.

use super::report::Report;
use crate::tree::{File, Language, Tree};
use anyhow::{Context, Result};
use std::{borrow::Cow, collections::HashSet};
use typos::{
    Dictionary, Status, check_str,
    tokens::{Identifier, Tokenizer, Word},
};
use unicase::UniCase;

const LIST: &str = "xtask/typos.txt";

pub(super) fn check(tree: &Tree, report: &mut Report) -> Result<()> {
    let list = tree
        .file(LIST)
        .with_context(|| format!("{LIST}: not found"))?;
    let words = list.text.lines().map(str::trim);
    let words = words.filter(|line| !line.starts_with('#'));
    let known = Known {
        words: words.map(str::to_lowercase).collect(),
    };
    for file in &tree.files {
        if file.language != Language::Other && !file.is_generated() {
            check_file(file, &known, report);
        }
    }
    Ok(())
}

fn check_file(file: &File, known: &Known, report: &mut Report) {
    let tokenizer = Tokenizer::new();
    for typo in check_str(&file.text, &tokenizer, known) {
        let advice = match &typo.corrections {
            Status::Corrections(words) => format!("write {}", words.join(" or ")),
            _ => "not a word".to_owned(),
        };
        let message = format!("`{}`: {advice}", typo.typo);
        report.problem(&file.path, file.line_at(typo.byte_offset), message);
    }
}

/// The dictionary of misspellings, and words in lower case to accept.
struct Known {
    words: HashSet<String>,
}

impl Known {
    fn accepts(&self, token: &str) -> Option<Status<'_>> {
        self.words
            .contains(&token.to_lowercase())
            .then_some(Status::Valid)
    }
}

impl Dictionary for Known {
    fn correct_ident<'s>(&'s self, identifier: Identifier<'_>) -> Option<Status<'s>> {
        self.accepts(identifier.token())
    }

    fn correct_word<'s>(&'s self, word: Word<'_>) -> Option<Status<'s>> {
        let misspelling = || {
            let corrections = typos_dict::WORD.find(&UniCase::new(word.token()))?;
            let words = corrections
                .iter()
                .map(|word| Cow::Borrowed(*word))
                .collect();
            Some(Status::Corrections(words))
        };
        self.accepts(word.token()).or_else(misspelling)
    }
}

#[cfg(test)]
mod tests {
    use crate::{tidy::problems, tree::Tree};

    // Written in two parts, so that the check does not find them here.
    const WRONG: &str = concat!("recie", "ve");

    fn found(list: &str, path: &str, text: &str) -> Vec<String> {
        problems(
            &Tree::of(&[("xtask/typos.txt", list), (path, text)]),
            "typos",
        )
    }

    #[test]
    fn misspellings_are_found_in_identifiers_and_text() {
        let source = format!("fn {WRONG}_all() {{}}\n// to {WRONG}\n");
        let message = format!("`{WRONG}`: write receive");
        let expected = [format!("1: {message}"), format!("2: {message}")];
        assert_eq!(found("", "a.rs", &source), expected);
    }

    #[test]
    fn listed_words_and_identifiers_pass() {
        let source = format!("fn {WRONG}_all() {{}}");
        assert!(found(&format!("# known\n{WRONG}\n"), "a.rs", &source).is_empty());
        assert!(found(&format!("{WRONG}_all\n"), "a.rs", &source).is_empty());
        assert!(found("", "a.rs", "// receive").is_empty());
    }
}
