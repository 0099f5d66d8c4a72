//! Comments of a Rust file, with the lines of one thought joined.

use crate::lexer::{Kind, pieces};

/// The mark of a comment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Style {
    /// `///` or `/**`: documents what follows.
    Outer,
    /// `//!` or `/*!`: documents the file or module.
    Inner,
    /// `//` or `/*`.
    Plain,
}

/// Neighboring comment lines of one style, or one comment behind code.
#[derive(Debug)]
pub(super) struct Block<'a> {
    pub style: Style,
    /// False if there is code before it on its line.
    pub whole_line: bool,
    /// Line on which the block begins, from 1.
    pub line: usize,
    /// The text without its marks, by line.
    pub lines: Vec<&'a str>,
}

impl Block<'_> {
    pub(super) fn is_doc(&self) -> bool {
        self.style != Style::Plain
    }

    fn continues_with(&self, next: &Block) -> bool {
        let adjacent = self.line + self.lines.len() == next.line;
        adjacent && self.whole_line && next.whole_line && self.style == next.style
    }
}

/// Returns the comments of `source`, in order.
pub(super) fn blocks(source: &str) -> Vec<Block<'_>> {
    let mut blocks: Vec<Block> = Vec::new();
    let mut at_line_start = true;
    for piece in pieces(source) {
        if piece.kind == Kind::Comment {
            let mut block = block(piece.text, piece.line);
            block.whole_line = at_line_start;
            match blocks.last_mut() {
                Some(last) if last.continues_with(&block) => last.lines.extend(block.lines),
                _ => blocks.push(block),
            }
        }
        let last_line = piece.text.rsplit('\n').next().unwrap_or_default();
        let begins_line = at_line_start || piece.text.contains('\n');
        at_line_start = begins_line && last_line.trim().is_empty();
    }
    blocks
}

fn block(text: &str, line: usize) -> Block<'_> {
    let style = if text.starts_with("////") || text.starts_with("/***") {
        Style::Plain
    } else if text.starts_with("///") || text.starts_with("/**") {
        Style::Outer
    } else if text.starts_with("//!") || text.starts_with("/*!") {
        Style::Inner
    } else {
        Style::Plain
    };
    let body = text.strip_suffix("*/").unwrap_or(text);
    let lines = body.lines().map(without_marks).collect();
    Block {
        style,
        whole_line: true,
        line,
        lines,
    }
}

fn without_marks(line: &str) -> &str {
    line.trim_start().trim_start_matches(['/', '!', '*']).trim()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbors_of_one_style_are_joined() {
        let source = "//! a\n\n/// b\n/// c\n// d\nfn e() {} // f\n// g\n/* h\n * i */";
        let found = blocks(source);
        let summary = |block: &Block| (block.line, block.whole_line, block.lines.join("|"));
        let expected = [
            (1, true, "a"),
            (3, true, "b|c"),
            (5, true, "d"),
            (6, false, "f"),
            (7, true, "g|h|i"),
        ];
        let expected = expected.map(|(line, whole, text)| (line, whole, text.to_owned()));
        assert_eq!(found.iter().map(summary).collect::<Vec<_>>(), expected);
        assert!(found[0].is_doc() && found[1].is_doc() && !found[2].is_doc());
    }
}
