//! Splits Rust and C++ source into code, comments and literals.
//!
//! `syn` drops comments, and several checks read nothing else. The lexer knows just enough to tell
//! the three apart: nested block comments, raw strings, and character literals against lifetimes.

/// The kind of a [`Piece`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Code,
    Comment,
    Literal,
}

/// A stretch of source of one kind. The pieces of a file are adjacent and cover it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece<'a> {
    pub kind: Kind,
    pub text: &'a str,
    /// Line on which the piece begins, from 1.
    pub line: usize,
}

/// Returns the pieces of `source`, in order.
pub(crate) fn pieces(source: &str) -> Vec<Piece<'_>> {
    let mut lexer = Lexer {
        source,
        at: 0,
        start: 0,
        line: 1,
        pieces: Vec::new(),
    };
    lexer.run();
    lexer.pieces
}

/// A run of letters, digits and `_` in code.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Word<'a> {
    pub text: &'a str,
    pub line: usize,
}

impl Word<'_> {
    /// True unless the word is a number. Keywords count as identifiers here.
    pub(crate) fn is_identifier(&self) -> bool {
        !self.text.starts_with(|c: char| c.is_ascii_digit())
    }
}

/// Returns the words outside comments and literals.
pub(crate) fn code_words(source: &str) -> Vec<Word<'_>> {
    let mut words = Vec::new();
    for piece in pieces(source)
        .iter()
        .filter(|piece| piece.kind == Kind::Code)
    {
        for (index, line) in piece.text.split('\n').enumerate() {
            let texts = line.split(|c| !is_word(c)).filter(|text| !text.is_empty());
            let line = piece.line + index;
            words.extend(texts.map(|text| Word { text, line }));
        }
    }
    words
}

struct Lexer<'a> {
    source: &'a str,
    at: usize,
    /// Offset and line at which the code before `at` begins.
    start: usize,
    line: usize,
    pieces: Vec<Piece<'a>>,
}

impl<'a> Lexer<'a> {
    fn run(&mut self) {
        while let Some(next) = self.rest().chars().next() {
            if self.rest().starts_with("//") {
                let length = self.rest().find('\n').unwrap_or(self.rest().len());
                self.close(Kind::Comment, length);
            } else if self.rest().starts_with("/*") {
                let length = block_comment(self.rest());
                self.close(Kind::Comment, length);
            } else if next == '"' {
                let length = quoted(self.rest(), '"');
                self.close(Kind::Literal, length);
            } else if next == '\'' && is_char_literal(self.rest()) {
                let length = quoted(self.rest(), '\'');
                self.close(Kind::Literal, length);
            } else if is_word(next) {
                self.identifier();
            } else {
                self.at += next.len_utf8();
            }
        }
        self.push(Kind::Code, self.at);
    }

    fn rest(&self) -> &'a str {
        &self.source[self.at..]
    }

    /// Steps over an identifier, or over the literal whose prefix it is (`r#"..."#`, `b'x'`).
    fn identifier(&mut self) {
        let length = identifier_length(self.rest());
        let prefix = &self.rest()[..length];
        let after = &self.rest()[length..];
        let hashes = after.len() - after.trim_start_matches('#').len();
        let raw = matches!(prefix, "r" | "br" | "cr") && after[hashes..].starts_with('"');
        if raw {
            let end = format!("\"{}", "#".repeat(hashes));
            let body = hashes + 1;
            let closed = after[body..].find(&end).map(|at| body + at + end.len());
            self.close(Kind::Literal, length + closed.unwrap_or(after.len()));
        } else if matches!(prefix, "b" | "c") && after.starts_with('"') {
            self.close(Kind::Literal, length + quoted(after, '"'));
        } else if prefix == "b" && after.starts_with('\'') {
            self.close(Kind::Literal, length + quoted(after, '\''));
        } else {
            self.at += length;
        }
    }

    /// Ends the code before the current place and adds a piece of `length` bytes.
    fn close(&mut self, kind: Kind, length: usize) {
        self.push(Kind::Code, self.at);
        self.at += length;
        self.push(kind, self.at);
    }

    fn push(&mut self, kind: Kind, end: usize) {
        let text = &self.source[self.start..end];
        if !text.is_empty() {
            let line = self.line;
            self.pieces.push(Piece { kind, text, line });
            self.line += text.matches('\n').count();
            self.start = end;
        }
    }
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn identifier_length(text: &str) -> usize {
    text.find(|c| !is_word(c)).unwrap_or(text.len())
}

fn block_comment(text: &str) -> usize {
    let mut depth = 0;
    let mut at = 0;
    while at < text.len() {
        let rest = &text.as_bytes()[at..];
        if rest.starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if rest.starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    text.len()
}

/// Returns the length of the literal between `quote`s at the start of `text`.
fn quoted(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        if !escaped && c == quote {
            return at + 1;
        }
        escaped = c == '\\' && !escaped;
    }
    text.len()
}

/// True if the apostrophe at the start of `text` opens a character, not a lifetime.
fn is_char_literal(text: &str) -> bool {
    let mut after = text.chars().skip(1);
    let first = after.next();
    first == Some('\\') || (first.is_some() && after.next() == Some('\''))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(kind: Kind, source: &str) -> Vec<&str> {
        let pieces = pieces(source);
        let all: String = pieces.iter().map(|piece| piece.text).collect();
        assert_eq!(all, source, "the pieces cover the source");
        let chosen = pieces.iter().filter(|piece| piece.kind == kind);
        chosen.map(|piece| piece.text).collect()
    }

    #[test]
    fn comments_end_with_their_line_or_their_last_mark() {
        let source = "a // b \"c\"\n/* d /* e */ f */ g";
        assert_eq!(
            of(Kind::Comment, source),
            ["// b \"c\"", "/* d /* e */ f */"]
        );
    }

    #[test]
    fn literals_hide_comment_marks_and_quotes() {
        let source = r##"f("// \" a", r#"" b"#, b"c", 'd', '\'', b'e')"##;
        let expected = [
            r#""// \" a""#,
            r##"r#"" b"#"##,
            "b\"c\"",
            "'d'",
            r"'\''",
            "b'e'",
        ];
        assert_eq!(of(Kind::Literal, source), expected);
    }

    #[test]
    fn lifetimes_and_raw_identifiers_are_code() {
        let source = "fn f<'a>(r#type: &'a str, b: &'static str)";
        assert_eq!(of(Kind::Code, source), [source]);
    }

    #[test]
    fn words_are_those_of_code() {
        let words = code_words("let x_1 = \"a\"; // b\n2.0f32");
        let texts: Vec<&str> = words.iter().map(|word| word.text).collect();
        assert_eq!(texts, ["let", "x_1", "2", "0f32"]);
        assert!(words[3].line == 2 && !words[3].is_identifier());
    }

    #[test]
    fn lines_count_from_one() {
        let lines: Vec<usize> = pieces("a\n// b\nc \"d\ne\" f")
            .iter()
            .map(|piece| piece.line)
            .collect();
        assert_eq!(lines, [1, 2, 2, 3, 4]);
    }
}
