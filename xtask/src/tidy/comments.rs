//! No comment of three words or fewer: it repeats a name, or the name should say it.
//!
//! Whole-line comments count, and doc comments up to their first heading or code block. Exempt are
//! comments that a tool or a reader looks for (`SAFETY:`), shapes (`[tokens, hidden]`), rulers
//! (`// ----`), and docs from which other text is generated (`JsonSchema`, `clap`): these need two
//! words.

use super::comment_blocks::{Block, blocks};
use super::report::Report;
use super::syntax::line;
use crate::tree::File;
use std::ops::RangeInclusive;
use syn::spanned::Spanned;
use syn::visit::{self, Visit};
use syn::{Attribute, ItemEnum, ItemStruct};

const FEW: usize = 3;

/// Derives that turn doc comments into help texts or reference pages.
const GENERATORS: [&str; 5] = ["Args", "JsonSchema", "Parser", "Subcommand", "ValueEnum"];

pub(super) fn check(file: &File, syntax: &syn::File, report: &mut Report) {
    let mut published = Published::default();
    published.visit_file(syntax);
    for block in blocks(&file.text) {
        let Some(words) = words(&block) else {
            continue;
        };
        let is_published = block.is_doc() && published.contains(block.line);
        if words <= if is_published { 1 } else { FEW } {
            let message = format!(
                "`{}`: delete it, improve the name, or say why",
                block.lines[0]
            );
            report.problem(&file.path, block.line, message);
        }
    }
}

/// Returns the number of words of a block, or nothing if it may be short.
fn words(block: &Block) -> Option<usize> {
    let is_section = |line: &&str| line.starts_with("# ") || line.starts_with("```");
    let sections = block
        .lines
        .iter()
        .position(is_section)
        .filter(|_| block.is_doc());
    let body = &block.lines[..sections.unwrap_or(block.lines.len())];
    let text = body.join(" ");
    let first = text.split_whitespace().next().unwrap_or_default();
    let is_marker = first.ends_with(':') && !first.contains(char::is_lowercase);
    let is_ruler = first.len() >= 3 && !first.contains(char::is_alphanumeric);
    let may_be_short = is_marker || is_ruler || has_shape(&text) || text.contains("tidy: allow");
    let has_letters = |word: &&str| word.contains(char::is_alphanumeric);
    let words = text.split_whitespace().filter(has_letters).count();
    let only_sections = words == 0 && sections.is_some();
    (block.whole_line && !may_be_short && !only_sections).then_some(words)
}

/// True if the text has dimensions in brackets, which are not a link.
fn has_shape(text: &str) -> bool {
    text.match_indices('[').any(|(at, _)| {
        let inside = &text[at + 1..];
        let end = inside.find(']').unwrap_or(inside.len());
        inside.starts_with(char::is_alphanumeric) && !inside[end..].starts_with("](")
    })
}

/// Lines of types whose docs other text is generated from.
#[derive(Default)]
struct Published {
    lines: Vec<RangeInclusive<usize>>,
}

impl Published {
    fn contains(&self, line: usize) -> bool {
        self.lines.iter().any(|lines| lines.contains(&line))
    }

    fn add(&mut self, attributes: &[Attribute], item: &impl Spanned) {
        let derives = attributes
            .iter()
            .filter(|attribute| attribute.path().is_ident("derive"));
        let names = derives.flat_map(derived);
        if names
            .into_iter()
            .any(|name| GENERATORS.contains(&name.as_str()))
        {
            self.lines.push(line(item)..=item.span().end().line);
        }
    }
}

/// Returns the last segments of the paths in `#[derive(...)]`.
fn derived(derive: &Attribute) -> Vec<String> {
    let mut names = Vec::new();
    let parsed = derive.parse_nested_meta(|meta| {
        let last = meta.path.segments.last();
        names.extend(last.map(|segment| segment.ident.to_string()));
        Ok(())
    });
    if parsed.is_ok() { names } else { Vec::new() }
}

impl Visit<'_> for Published {
    fn visit_item_struct(&mut self, item: &ItemStruct) {
        self.add(&item.attrs, item);
        visit::visit_item_struct(self, item);
    }

    fn visit_item_enum(&mut self, item: &ItemEnum) {
        self.add(&item.attrs, item);
        visit::visit_item_enum(self, item);
    }
}

#[cfg(test)]
mod tests {
    use crate::tidy::problems_in;

    fn lines(source: &str) -> Vec<String> {
        let problems = problems_in("a.rs", source, "comments");
        let line = |problem: &String| problem.split(':').next().unwrap().to_owned();
        problems.iter().map(line).collect()
    }

    #[test]
    fn short_comments_are_found() {
        let source = "\n/// Yes.\nfn a() {}\n\nfn b() {\n    // Now go\n    // on.\n}\n";
        assert_eq!(lines(source), ["2", "6"]);
        let message = &problems_in("a.rs", source, "comments")[0];
        assert_eq!(
            message,
            "2: `Yes.`: delete it, improve the name, or say why"
        );
    }

    #[test]
    fn sections_do_not_make_a_short_doc_longer() {
        assert_eq!(
            lines("/// Saves it.\n///\n/// # Errors\n/// If a b c d.\nfn a() {}"),
            ["1"]
        );
        assert!(lines("/// # Errors\n/// If b.\nfn a() {}").is_empty());
    }

    #[test]
    fn markers_shapes_rulers_and_trailing_comments_may_be_short() {
        assert!(lines("// SAFETY: yes.\nfn a() {} // yes").is_empty());
        assert!(lines("/// `x`: [tokens, hidden].\nfn a() {}\n// ---- parts").is_empty());
        assert_eq!(lines("/// See [`A`].\nfn a() {}"), ["1"]);
    }

    #[test]
    fn docs_that_are_published_need_two_words() {
        let source = "#[derive(clap::Args)]\nstruct A {\n /// Sampling seed\n seed: u64,\n \
                      /// Size\n size: u64,\n}";
        assert_eq!(lines(source), ["5"]);
    }
}
