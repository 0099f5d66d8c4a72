//! Relative links in Markdown lead to files and headings that exist, and the table of contents of
//! the book lists every page.

use super::report::Report;
use crate::tree::{File, Language, Tree};
use anyhow::Result;
use pulldown_cmark::{Event, Options, Parser, Tag, TagEnd};
use std::collections::{BTreeMap, HashMap, HashSet};

const BOOK: &str = "docs/";
const CONTENTS: &str = "docs/SUMMARY.md";

pub(super) fn check(tree: &Tree, report: &mut Report) -> Result<()> {
    let pages = tree
        .files
        .iter()
        .filter(|file| file.language == Language::Markdown);
    let pages: BTreeMap<&str, Page> = pages
        .map(|file| (file.path.as_str(), Page::read(file)))
        .collect();
    for (path, page) in &pages {
        for link in &page.links {
            if let Some(message) = fault(tree, &pages, path, &link.target) {
                report.problem(path, link.line, message);
            }
        }
    }
    check_contents(&pages, report);
    Ok(())
}

/// Reports the pages of the book that its table of contents leaves out.
fn check_contents(pages: &BTreeMap<&str, Page>, report: &mut Report) {
    let Some(contents) = pages.get(CONTENTS) else {
        report.problem(CONTENTS, 1, "the book has no table of contents");
        return;
    };
    let listed: HashSet<String> = contents
        .links
        .iter()
        .map(|link| resolve(CONTENTS, &link.target))
        .collect();
    for path in pages
        .keys()
        .filter(|path| path.starts_with(BOOK) && **path != CONTENTS)
    {
        if !listed.contains(*path) {
            report.problem(CONTENTS, 1, format!("{path} is not listed"));
        }
    }
}

/// Says what is wrong with a link, if anything is.
fn fault(tree: &Tree, pages: &BTreeMap<&str, Page>, from: &str, target: &str) -> Option<String> {
    let is_external = target.contains("://") || target.starts_with("mailto:");
    if is_external {
        return None;
    }
    let (file, anchor) = target.split_once('#').unwrap_or((target, ""));
    let path = if file.is_empty() {
        from.to_owned()
    } else {
        resolve(from, file)
    };
    let folder = format!("{path}/");
    let exists = |known: &File| known.path == path || known.path.starts_with(&folder);
    if !path.is_empty() && !tree.files.iter().any(exists) {
        return Some(format!("dead link: there is no {path}"));
    }
    let page = pages.get(path.as_str())?;
    let is_dead = !anchor.is_empty() && !page.anchors.contains(anchor);
    is_dead.then(|| format!("dead link: {path} has no heading #{anchor}"))
}

/// Returns the path from the root of what `target` names, as seen from the page `from`.
fn resolve(from: &str, target: &str) -> String {
    let mut parts: Vec<&str> = from.split('/').collect();
    parts.pop();
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            name => parts.push(name),
        }
    }
    parts.join("/")
}

struct Link {
    target: String,
    line: usize,
}

/// The links of a page, and the places in it that links can name.
#[derive(Default)]
struct Page {
    links: Vec<Link>,
    anchors: HashSet<String>,
}

impl Page {
    fn read(file: &File) -> Page {
        let mut page = Page::default();
        let mut seen: HashMap<String, usize> = HashMap::new();
        let mut heading: Option<String> = None;
        let options =
            Options::ENABLE_TABLES | Options::ENABLE_FOOTNOTES | Options::ENABLE_HEADING_ATTRIBUTES;
        for (event, range) in Parser::new_ext(&file.text, options).into_offset_iter() {
            match event {
                Event::Start(Tag::Heading { id, .. }) => {
                    page.anchors.extend(id.map(|id| id.to_string()));
                    heading = Some(String::new());
                }
                Event::End(TagEnd::Heading(_)) => {
                    let slug = slug(&heading.take().unwrap_or_default());
                    let before = seen.entry(slug.clone()).or_default();
                    page.anchors.insert(numbered(&slug, *before));
                    *before += 1;
                }
                Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) => {
                    page.links.push(Link {
                        target: dest_url.to_string(),
                        line: file.line_at(range.start),
                    });
                }
                Event::Text(text) | Event::Code(text) => {
                    if let Some(title) = &mut heading {
                        title.push_str(&text);
                    }
                }
                Event::Html(html) | Event::InlineHtml(html) => {
                    page.anchors.extend(ids(&html).map(str::to_owned));
                }
                _ => {}
            }
        }
        page
    }
}

/// Returns the anchor that GitHub and mdBook give a heading.
fn slug(heading: &str) -> String {
    let kept = heading.trim().chars().filter_map(|c| match c {
        ' ' => Some('-'),
        c if c.is_alphanumeric() || matches!(c, '-' | '_') => Some(c),
        _ => None,
    });
    kept.flat_map(char::to_lowercase).collect()
}

/// Returns the anchor of a heading with the same text as `before` earlier ones.
fn numbered(slug: &str, before: usize) -> String {
    if before == 0 {
        return slug.to_owned();
    }
    format!("{slug}-{before}")
}

/// Returns the values of `id` and `name` attributes.
fn ids(html: &str) -> impl Iterator<Item = &str> {
    let values = [" id=\"", " name=\""].map(|start| html.split(start).skip(1));
    values
        .into_iter()
        .flatten()
        .filter_map(|rest| rest.split('"').next())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::problems;

    const CONTENTS_OF_A: &str = "[a](a.md)";

    fn found(page: &str) -> Vec<String> {
        let files = [
            ("README.md", "# Two Words\n# Two Words\n<a id=\"here\"></a>"),
            ("docs/a.md", page),
            (CONTENTS, CONTENTS_OF_A),
        ];
        problems(&Tree::of(&files), "links")
    }

    #[test]
    fn dead_links_are_found() {
        let expected = ["2: dead link: there is no docs/b.md"];
        assert_eq!(found("x\n[b](b.md)"), expected);
        let expected = ["1: dead link: README.md has no heading #three"];
        assert_eq!(found("[b](../README.md#three)"), expected);
        assert_eq!(
            found("[b](#c)"),
            ["1: dead link: docs/a.md has no heading #c"]
        );
    }

    #[test]
    fn live_links_pass() {
        let links = "# A `b`: c!\n[a](#a-b-c) [b](../README.md#two-words-1) [c](../README.md#here) \
                     [d](https://x.org/y) ![e](../docs)\n```\n[f](g)\n```\n";
        assert!(found(links).is_empty());
    }

    #[test]
    fn unlisted_pages_are_found() {
        let tree = Tree::of(&[
            (CONTENTS, CONTENTS_OF_A),
            ("docs/a.md", ""),
            ("docs/b.md", ""),
        ]);
        assert_eq!(problems(&tree, "links"), ["1: docs/b.md is not listed"]);
    }
}
