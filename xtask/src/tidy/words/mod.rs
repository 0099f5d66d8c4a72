//! No word or phrase that `xtask/words.txt` bans.
//!
//! `prose` phrases are looked for in the comments and strings of Rust and C++ and in all text of
//! other files, across line breaks; `ident` words in the identifiers and file names of Rust and
//! C++; `start` phrases at the start of doc comments.

mod identifiers;
mod list;
mod prose;

use super::{comment_blocks::blocks, report::Report};
use crate::{
    lexer::{Kind, code_words, pieces},
    tree::{File, Language, Tree},
};
use anyhow::{Context, Result};
use identifiers::segments;
use list::{Entry, List};
use prose::Prose;

const LIST: &str = "xtask/words.txt";

pub(super) fn check(tree: &Tree, report: &mut Report) -> Result<()> {
    let list = tree
        .file(LIST)
        .with_context(|| format!("{LIST}: not found"))?;
    let list = List::parse(&list.text)?;
    for file in &tree.files {
        if file.is_generated() || list.exempts(&file.path) {
            continue;
        }
        match file.language {
            Language::Rust | Language::Cpp => check_code(file, &list, report),
            Language::Other => {}
            _ => {
                let lines: Vec<&str> = file.text.lines().collect();
                check_prose(file, &Prose::new(1, &lines), &list, report);
            }
        }
    }
    Ok(())
}

fn check_code(file: &File, list: &List, report: &mut Report) {
    for block in blocks(&file.text) {
        let prose = Prose::new(block.line, &block.lines);
        check_prose(file, &prose, list, report);
        if block.is_doc()
            && let Some(entry) = list
                .start
                .iter()
                .find(|entry| prose.matches(0, &entry.words))
        {
            let message = format!("doc starts with `{}`: {}", entry.phrase(), entry.advice);
            report.problem(&file.path, block.line, message);
        }
    }
    for segments in file.path.split(['/', '.']).map(segments) {
        check_identifier(file, 1, &segments, list, report);
    }
    for piece in pieces(&file.text)
        .iter()
        .filter(|piece| piece.kind == Kind::Literal)
    {
        let lines = prose::literal_lines(piece.text);
        let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
        check_prose(file, &Prose::new(piece.line, &lines), list, report);
    }
    for word in code_words(&file.text)
        .iter()
        .filter(|word| word.is_identifier())
    {
        check_identifier(file, word.line, &segments(word.text), list, report);
    }
}

fn check_prose(file: &File, prose: &Prose, list: &List, report: &mut Report) {
    for at in 0..prose.words.len() {
        for entry in list.prose_starting_with(&prose.words[at].text) {
            let line = prose.words[at].line;
            if prose.matches(at, &entry.words) && !allowed(file, line, entry, list) {
                report.problem(&file.path, line, message(entry));
            }
        }
    }
}

fn check_identifier(
    file: &File,
    line: usize,
    segments: &[String],
    list: &List,
    report: &mut Report,
) {
    for entry in &list.ident {
        let found = segments
            .windows(entry.words.len())
            .any(|part| part == entry.words);
        if found && !allowed(file, line, entry, list) {
            report.problem(&file.path, line, message(entry));
        }
    }
}

fn message(entry: &Entry) -> String {
    format!("`{}`: use {}", entry.phrase(), entry.advice)
}

/// True if the line has the phrase only within a longer one that the list allows.
fn allowed(file: &File, line: usize, entry: &Entry, list: &List) -> bool {
    let text = file
        .text
        .lines()
        .nth(line - 1)
        .unwrap_or_default()
        .to_lowercase();
    let mut rest = text.clone();
    for longer in &list.allow {
        rest = rest.replace(longer, "");
    }
    let mut remaining = rest.split(|c: char| !c.is_alphanumeric());
    rest != text && !remaining.any(|word| word == entry.words[0])
}

#[cfg(test)]
mod tests {
    use crate::{tidy::problems, tree::Tree};

    const LIST: &str = "\
exempt docs/glossary.md
allow std::borrow
allow high road
prose goes on -> continues
prose road -> path
ident road -> path
ident borrow -> lend
start what -> start with a verb
";

    fn found(path: &str, text: &str) -> Vec<String> {
        problems(
            &Tree::of(&[("xtask/words.txt", LIST), (path, text)]),
            "words",
        )
    }

    #[test]
    fn phrases_are_found_in_comments_strings_and_across_lines() {
        let source = "// It Goes\n// on.\nfn a() { b(\"the ROAD\"); }\n";
        assert_eq!(
            found("a.rs", source),
            ["1: `goes on`: use continues", "3: `road`: use path"]
        );
        assert_eq!(
            found("a.md", "it goes\non"),
            ["1: `goes on`: use continues"]
        );
        assert_eq!(found("a.sh", "x # a road"), ["1: `road`: use path"]);
    }

    #[test]
    fn identifiers_are_found_by_their_segments() {
        let source = "fn a() {\n let BigRoad = 1;\n let road_map = 2;\n let roads = 3;\n}";
        let expected = ["2: `road`: use path", "3: `road`: use path"];
        assert_eq!(found("a.rs", source), expected);
        assert_eq!(found("x/road.rs", ""), ["1: `road`: use path"]);
    }

    #[test]
    fn docs_are_judged_by_their_start() {
        let source = "/// What it is,\n/// what else.\nfn a() {}\n// What is plain.\n";
        let expected = ["1: doc starts with `what`: start with a verb"];
        assert_eq!(found("a.rs", source), expected);
    }

    #[test]
    fn other_words_longer_phrases_and_exempt_files_pass() {
        let source = "use std::borrow::Cow;\n// roads, goes, on; goes. On the high road.\n";
        assert!(found("a.rs", source).is_empty());
        assert!(found("docs/glossary.md", "it goes on").is_empty());
        assert!(found("a.md", "a road <!-- tidy: allow(words) -->").is_empty());
    }
}
