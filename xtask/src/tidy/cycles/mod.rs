//! No import cycle between the files of a crate.
//!
//! A file imports another if its code, tests aside, names something that is defined there, by a
//! `use` or by a path. Through a re-export it imports both the file that is named and the file that
//! defines the item. No import are: declaring a module, re-exporting an item of a submodule, naming
//! a module alone, and whatever a submodule uses of the modules above it.

mod graph;
mod modules;
mod names;

use super::report::Report;
use crate::tree::Tree;
use anyhow::Result;
use graph::{Cycle, Graph};
use modules::Modules;

pub(super) fn check(tree: &Tree, report: &mut Report) -> Result<()> {
    let is_root = |path: &str| {
        path.ends_with("src/lib.rs") || path.ends_with("src/main.rs") || path == "tests/main.rs"
    };
    for root in tree.files.iter().filter(|file| is_root(&file.path)) {
        let mut graph = Graph::default();
        for import in Modules::read(tree, root)?.imports() {
            graph.add(import.from, import.to, import.line);
        }
        for cycle in graph.cycles() {
            report_cycle(&graph, &cycle, report);
        }
    }
    Ok(())
}

/// Reports a cycle at its first file, with a line of each import that belongs to it.
fn report_cycle(graph: &Graph, cycle: &Cycle, report: &mut Report) {
    let files = &cycle.shortest;
    let mut message = format!(
        "{} files import each other: move what they share",
        files.len()
    );
    let nexts = files.iter().cycle().skip(1);
    for (from, to) in files.iter().zip(nexts) {
        let line = graph.line(from, to).unwrap_or(1);
        message += &format!("\n    {from}:{line} imports {to}");
    }
    let others = cycle.group.iter().filter(|file| !files.contains(file));
    for other in others {
        message += &format!("\n    {other} is in other cycles with them");
    }
    let line = graph.line(files[0], files[1]);
    report.problem(files[0], line.unwrap_or(1), message);
}

#[cfg(test)]
mod tests {
    use crate::{tidy::problems, tree::Tree};

    fn found(files: &[(&str, &str)]) -> Vec<String> {
        problems(&Tree::of(files), "cycles")
    }

    const HEAD: &str = "2 files import each other: move what they share";

    #[test]
    fn files_that_import_each_other_are_found() {
        let files = [
            ("a/src/lib.rs", "mod b;\nmod c;"),
            ("a/src/b.rs", "use crate::c::C;\npub struct B(C);"),
            ("a/src/c.rs", "pub struct C;\n\nfn f() { g!(super::b::B) }"),
        ];
        let imports = "\n    a/src/b.rs:1 imports a/src/c.rs\n    a/src/c.rs:3 imports a/src/b.rs";
        assert_eq!(found(&files), [format!("1: {HEAD}{imports}")]);
    }

    #[test]
    fn a_submodule_may_use_the_modules_above_it() {
        let files = [
            ("a/src/lib.rs", "mod b;\nfn f(b: b::B) {}"),
            ("a/src/b/mod.rs", "mod c;\npub struct B;\nfn f() { c::f() }"),
            ("a/src/b/c.rs", "use super::B;\npub fn f() { crate::f(B) }"),
        ];
        assert!(found(&files).is_empty());
    }

    #[test]
    fn a_re_export_is_an_import_of_the_file_that_is_named() {
        let files = [
            ("a/src/lib.rs", "mod b;\nmod d;"),
            ("a/src/b/mod.rs", "mod c;\npub use c::C;\nuse crate::d::D;"),
            ("a/src/b/c.rs", "pub struct C;"),
            ("a/src/d.rs", "use crate::b::C;\npub struct D(C);"),
        ];
        assert!(found(&files)[0].contains("a/src/d.rs:1 imports a/src/b/mod.rs"));
    }

    #[test]
    fn re_exports_are_followed_to_the_definition() {
        let files = [
            (
                "a/src/lib.rs",
                "mod b;\nmod c;\npub use b::B;\npub use c::*;",
            ),
            ("a/src/b.rs", "pub struct B;"),
            ("a/src/c.rs", "use crate::B;\npub struct C(B);"),
        ];
        assert!(found(&files).is_empty());
        let files = [
            files[0],
            ("a/src/b.rs", "use crate::C;\npub struct B;"),
            files[2],
        ];
        assert!(found(&files)[0].contains("a/src/b.rs:1 imports a/src/c.rs"));
    }

    #[test]
    fn tests_may_import_anything() {
        let files = [
            ("a/src/lib.rs", "mod b;\npub struct A(b::B);"),
            (
                "a/src/b.rs",
                "pub struct B;\n#[cfg(test)]\nmod tests { use crate::A; }",
            ),
        ];
        assert!(found(&files).is_empty());
    }
}
