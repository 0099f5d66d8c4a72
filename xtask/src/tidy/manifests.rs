//! Manifests say what crates.io and readers ask for, and no dependency is unused.

use super::report::Report;
use crate::lexer::code_words;
use crate::tree::{File, Language, Tree};
use anyhow::Result;
use std::collections::HashSet;

const KEYS: [&str; 6] = [
    "name",
    "description",
    "version",
    "edition",
    "license",
    "rust-version",
];

pub(super) fn check(tree: &Tree, report: &mut Report) -> Result<()> {
    let manifests = tree.written_in(Language::Toml);
    let manifests: Vec<&File> = manifests
        .filter(|file| file.path.ends_with("/Cargo.toml"))
        .collect();
    for manifest in &manifests {
        check_keys(manifest, report);
        check_uses(tree, manifest, report);
    }
    if let Some(workspace) = tree.file("Cargo.toml") {
        for dependency in dependencies(workspace) {
            let inherits = |manifest: &&File| {
                dependencies(manifest)
                    .iter()
                    .any(|own| own.name == dependency.name)
            };
            if !manifests.iter().any(inherits) {
                let message = format!("`{}`: no crate depends on it: remove it", dependency.name);
                report.problem(&workspace.path, dependency.line, message);
            }
        }
    }
    Ok(())
}

fn check_keys(manifest: &File, report: &mut Report) {
    let package = manifest
        .text
        .lines()
        .skip_while(|line| *line != "[package]")
        .skip(1);
    let package: Vec<&str> = package.take_while(|line| !line.starts_with('[')).collect();
    for key in KEYS {
        let sets = |line: &&str| key_of(line) == key;
        if !package.iter().any(sets) {
            report.problem(
                &manifest.path,
                1,
                format!("[package] has no `{key}`: add it"),
            );
        }
    }
    if !manifest.text.contains("[lints]\nworkspace = true") {
        report.problem(&manifest.path, 1, "no `[lints] workspace = true`: add it");
    }
}

/// Reports the dependencies that the sources of a crate never name.
fn check_uses(tree: &Tree, manifest: &File, report: &mut Report) {
    // The sources of the crate `launch` include the system tests at the top.
    let has_system_tests = manifest.text.contains("\"../tests/");
    let mut names: HashSet<&str> = HashSet::new();
    for file in tree.written_in(Language::Rust) {
        let folder = file.top_folder();
        if folder == manifest.top_folder() || (has_system_tests && folder == "tests") {
            names.extend(code_words(&file.text).into_iter().map(|word| word.text));
        }
    }
    for dependency in dependencies(manifest) {
        if !names.contains(dependency.name.replace('-', "_").as_str()) {
            let message = format!("`{}`: no source uses it: remove it", dependency.name);
            report.problem(&manifest.path, dependency.line, message);
        }
    }
}

struct Dependency<'a> {
    name: &'a str,
    line: usize,
}

/// Returns the dependencies of a manifest, for building, testing and running.
fn dependencies(manifest: &File) -> Vec<Dependency<'_>> {
    let mut found = Vec::new();
    let mut in_section = false;
    for (line, text) in manifest.lines() {
        if text.starts_with('[') {
            in_section = text.ends_with("dependencies]");
        } else if in_section && text.contains('=') && !text.starts_with('#') {
            let name = key_of(text);
            found.push(Dependency { name, line });
        }
    }
    found
}

/// Returns the key that a line sets, `name` for `name.workspace = true`.
fn key_of(line: &str) -> &str {
    let end = line.find(['=', '.', ' ']).unwrap_or(line.len());
    &line[..end]
}

#[cfg(test)]
mod tests {
    use crate::tidy::problems;
    use crate::tree::Tree;

    const PACKAGE: &str = "[package]\nname = \"a\"\ndescription = \"b\"\nversion.workspace = true\n\
        edition.workspace = true\nlicense.workspace = true\nrust-version.workspace = true\n\
        [lints]\nworkspace = true\n[dependencies]\n";

    fn found(manifest: &str, source: &str) -> Vec<String> {
        let workspace = "[workspace.dependencies]\nnix = \"1\"\n";
        let files = [
            ("Cargo.toml", workspace),
            ("a/Cargo.toml", manifest),
            ("a/src/lib.rs", source),
        ];
        problems(&Tree::of(&files), "manifests")
    }

    #[test]
    fn missing_keys_are_found() {
        let manifest = PACKAGE.replace("license.workspace = true\n", "") + "nix = \"1\"\n";
        let expected = ["1: [package] has no `license`: add it"];
        assert_eq!(found(&manifest, "use nix::A;"), expected);
    }

    #[test]
    fn unused_dependencies_are_found() {
        let expected = ["2: `nix`: no crate depends on it: remove it"];
        assert_eq!(found(PACKAGE, ""), expected);
        let manifest = format!("{PACKAGE}nix.workspace = true\n");
        assert_eq!(
            found(&manifest, "// nix"),
            ["11: `nix`: no source uses it: remove it"]
        );
        assert!(found(&manifest, "nix::f();").is_empty());
    }
}
