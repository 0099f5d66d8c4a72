//! The list of banned words.

use anyhow::{Context, Result, bail, ensure};
use std::collections::HashMap;

/// A phrase that the list refuses.
#[derive(Debug)]
pub(super) struct Entry {
    /// Its words in lower case; the segments, for an identifier.
    pub words: Vec<String>,
    /// What to write instead.
    pub advice: String,
}

impl Entry {
    pub(super) fn phrase(&self) -> String {
        self.words.join(" ")
    }
}

/// The phrases by kind, and the exceptions.
#[derive(Debug, Default)]
pub(super) struct List {
    /// By first word, because prose has many words.
    prose: HashMap<String, Vec<Entry>>,
    pub ident: Vec<Entry>,
    pub start: Vec<Entry>,
    /// Phrases in lower case within which nothing is banned.
    pub allow: Vec<String>,
    /// Files, or folders ending in `/`, that may use the words.
    exempt: Vec<String>,
}

impl List {
    /// Parses `xtask/words.txt`, whose head documents the format.
    ///
    /// # Errors
    /// If a line has no known kind, no phrase or no replacement.
    pub(super) fn parse(text: &str) -> Result<List> {
        let mut list = List::default();
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            if !line.is_empty() && !line.starts_with('#') {
                list.add(line)
                    .with_context(|| format!("xtask/words.txt:{}", index + 1))?;
            }
        }
        Ok(list)
    }

    fn add(&mut self, line: &str) -> Result<()> {
        let (kind, rest) = line.split_once(' ').context("a line is `KIND PHRASE`")?;
        let rest = rest.trim();
        match kind {
            "allow" => self.allow.push(rest.to_lowercase()),
            "exempt" => self.exempt.push(rest.to_owned()),
            "prose" => {
                let entry = entry(rest)?;
                let first = entry.words[0].clone();
                self.prose.entry(first).or_default().push(entry);
            }
            "ident" => self.ident.push(entry(rest)?),
            "start" => self.start.push(entry(rest)?),
            _ => bail!("unknown kind {kind}"),
        }
        Ok(())
    }

    pub(super) fn prose_starting_with(&self, word: &str) -> &[Entry] {
        self.prose.get(word).map_or(&[], Vec::as_slice)
    }

    pub(super) fn exempts(&self, path: &str) -> bool {
        self.exempt
            .iter()
            .any(|exempt| path == exempt || (exempt.ends_with('/') && path.starts_with(exempt)))
    }
}

fn entry(text: &str) -> Result<Entry> {
    let (phrase, advice) = text
        .split_once("->")
        .context("a line is `PHRASE -> REPLACEMENT`")?;
    let words: Vec<String> = phrase.split_whitespace().map(str::to_lowercase).collect();
    ensure!(!words.is_empty(), "the phrase is missing");
    ensure!(!advice.trim().is_empty(), "the replacement is missing");
    let advice = advice.trim().to_owned();
    Ok(Entry { words, advice })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_of_the_project_is_valid() {
        List::parse(include_str!("../../../words.txt")).unwrap();
    }

    #[test]
    fn a_line_without_replacement_is_refused_with_its_number() {
        let error = List::parse("# comment\nprose road\n").unwrap_err();
        assert_eq!(error.to_string(), "xtask/words.txt:2");
    }
}
