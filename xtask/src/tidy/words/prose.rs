//! Text as a sequence of words.

/// A word of a text.
#[derive(Debug)]
pub(super) struct Word {
    /// In lower case, without a possessive `'s`.
    pub text: String,
    pub line: usize,
    /// True if only white space separates it from the word before.
    follows: bool,
}

/// Consecutive lines of text, as words.
#[derive(Debug)]
pub(super) struct Prose {
    pub words: Vec<Word>,
}

impl Prose {
    /// Splits lines, the first of which has the number `line`, into words.
    pub(super) fn new(line: usize, lines: &[&str]) -> Prose {
        let mut words: Vec<Word> = Vec::new();
        let mut separated = false;
        for (index, text) in lines.iter().enumerate() {
            // Marks of a wrapped comment, quotation or list do not separate words.
            let mut rest = text
                .trim_start()
                .trim_start_matches(['#', '/', '>', '*', ' ']);
            separated |= rest.is_empty();
            while let Some(start) = rest.find(is_word) {
                separated |= !rest[..start].trim().is_empty();
                rest = &rest[start..];
                let length = word_length(rest);
                let word = rest[..length].to_lowercase();
                words.push(Word {
                    text: word.trim_end_matches("'s").to_owned(),
                    line: line + index,
                    follows: !separated,
                });
                separated = false;
                rest = &rest[length..];
            }
            separated |= !rest.trim().is_empty();
        }
        Prose { words }
    }

    /// True if `phrase` stands at the word `at`, with nothing but spaces between its words.
    pub(super) fn matches(&self, at: usize, phrase: &[String]) -> bool {
        let words = self.words.iter().skip(at);
        words.len() >= phrase.len()
            && phrase
                .iter()
                .zip(words)
                .enumerate()
                .all(|(index, (expected, word))| {
                    *expected == word.text && (index == 0 || word.follows)
                })
    }
}

/// Returns the lines of a string literal, without escapes and quotes.
pub(super) fn literal_lines(literal: &str) -> Vec<String> {
    let plain = |line: &str| {
        let line = line.strip_suffix('\\').unwrap_or(line);
        line.replace("\\n", " ; ")
            .replace("\\t", " ")
            .replace("\\\"", "\"")
    };
    literal.trim_matches('"').lines().map(plain).collect()
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Returns the length of the word at the start of `text`; `'` and `-` belong to it inside.
fn word_length(text: &str) -> usize {
    let mut end = 0;
    let mut chars = text.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        let before_word = chars.peek().is_some_and(|&(_, next)| is_word(next));
        let joins = matches!(c, '\'' | '-') && before_word;
        if !(is_word(c) || joins) {
            break;
        }
        end = at + c.len_utf8();
    }
    end
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        let lines: Vec<&str> = text.lines().collect();
        let prose = Prose::new(1, &lines);
        prose.words.into_iter().map(|word| word.text).collect()
    }

    #[test]
    fn possessives_are_cut_and_hyphens_kept() {
        assert_eq!(
            words("Nobody's don't 'road-map'"),
            ["nobody", "don't", "road-map"]
        );
    }

    #[test]
    fn punctuation_separates_words_also_at_a_line_end() {
        let phrase = ["goes".to_owned(), "on".to_owned()];
        let matches = |lines: &[&str]| Prose::new(1, lines).matches(0, &phrase);
        assert!(matches(&["goes  on"]) && matches(&["goes", "  # on"]));
        assert!(!matches(&["goes, on"]) && !matches(&["goes.", "on"]));
    }

    #[test]
    fn escapes_of_literals_are_not_words() {
        assert_eq!(literal_lines(r#""a\nroad""#), ["a ; road"]);
    }
}
