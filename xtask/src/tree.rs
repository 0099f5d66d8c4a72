//! The files of the project, as git lists them.

use anyhow::{Context, Result, ensure};
use std::{
    path::{Path, PathBuf},
    process::Command,
};

/// Folders and files that a program writes; their text is not held to the rules.
const GENERATED: [&str; 4] = [
    "Cargo.lock",
    "configs/schema.json",
    "docs/reference/",
    "trainer/tests/golden/",
];

/// The language of a file, from its extension or its `#!` line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Language {
    Rust,
    Cpp,
    Python,
    Shell,
    Yaml,
    Toml,
    Markdown,
    Other,
}

/// A text file of the project.
pub(crate) struct File {
    /// Path from the root, with `/` between its parts.
    pub path: String,
    pub language: Language,
    pub text: String,
}

impl File {
    fn new(path: &str, text: String) -> File {
        let language = language(path, &text);
        File {
            path: path.to_owned(),
            language,
            text,
        }
    }

    /// Returns the lines with their numbers, from 1.
    pub(crate) fn lines(&self) -> impl Iterator<Item = (usize, &str)> {
        self.text
            .lines()
            .enumerate()
            .map(|(index, line)| (index + 1, line))
    }

    /// Returns the number of the line that holds the byte at `offset`.
    pub(crate) fn line_at(&self, offset: usize) -> usize {
        self.text[..offset].matches('\n').count() + 1
    }

    /// Returns the folder at the top that holds the file: its crate, `tests`, `docs` and so on.
    pub(crate) fn top_folder(&self) -> &str {
        self.path.split_once('/').map_or("", |(folder, _)| folder)
    }

    pub(crate) fn is_generated(&self) -> bool {
        self.path.ends_with(".snap") || GENERATED.iter().any(|start| self.path.starts_with(start))
    }
}

/// All text files of the project.
pub(crate) struct Tree {
    pub root: PathBuf,
    pub files: Vec<File>,
}

impl Tree {
    /// Reads every text file that git tracks or would track.
    ///
    /// # Errors
    /// If git cannot list the files, or a file cannot be read.
    pub(crate) fn read(root: &Path) -> Result<Tree> {
        let mut git = Command::new("git");
        git.current_dir(root);
        git.args(["ls-files", "-z", "--cached", "--others"]);
        git.args(["--exclude-standard", "--deduplicate"]);
        let output = git.output().context("git ls-files")?;
        ensure!(
            output.status.success(),
            "git ls-files: {}",
            String::from_utf8_lossy(&output.stderr).trim_end()
        );
        let mut files = Vec::new();
        for path in String::from_utf8_lossy(&output.stdout).split_terminator('\0') {
            let bytes = match std::fs::read(root.join(path)) {
                Ok(bytes) => bytes,
                // Deleted, but still in git's index.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error).with_context(|| path.to_owned()),
            };
            // Binary files have no lines to check.
            if let Ok(text) = String::from_utf8(bytes) {
                files.push(File::new(path, text));
            }
        }
        let root = root.to_owned();
        Ok(Tree { root, files })
    }

    /// Makes a tree of these paths and texts, which are not on disk.
    #[cfg(test)]
    pub(crate) fn of(files: &[(&str, &str)]) -> Tree {
        let file = |(path, text): &(&str, &str)| File::new(path, text.to_string());
        Tree {
            root: PathBuf::new(),
            files: files.iter().map(file).collect(),
        }
    }

    pub(crate) fn file(&self, path: &str) -> Option<&File> {
        self.files.iter().find(|file| file.path == path)
    }

    /// Returns the files of `language` that people write.
    pub(crate) fn written_in(&self, language: Language) -> impl Iterator<Item = &File> {
        self.files
            .iter()
            .filter(move |file| file.language == language && !file.is_generated())
    }
}

fn language(path: &str, text: &str) -> Language {
    let name = path.rsplit('/').next().unwrap_or(path);
    match name.rsplit_once('.').map(|(_, extension)| extension) {
        Some("rs") => Language::Rust,
        Some("cpp" | "h" | "cu" | "cuh") => Language::Cpp,
        Some("py") => Language::Python,
        Some("sh") => Language::Shell,
        Some("yaml" | "yml") => Language::Yaml,
        Some("toml") => Language::Toml,
        Some("md") => Language::Markdown,
        Some(_) => Language::Other,
        None => match text.lines().next().unwrap_or_default() {
            first if !first.starts_with("#!") => Language::Other,
            first if first.contains("python") => Language::Python,
            _ => Language::Shell,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scripts_without_extension_are_known_by_their_first_line() {
        let languages = |text| language("scripts/x", text);
        assert_eq!(languages("#!/usr/bin/env bash\n"), Language::Shell);
        assert_eq!(languages("#!/usr/bin/env python3\n"), Language::Python);
        assert_eq!(languages("plain"), Language::Other);
        assert_eq!(language("a.b/c.rs", ""), Language::Rust);
    }

    #[test]
    fn generated_files_are_not_among_the_written_ones() {
        let tree = Tree::of(&[("docs/a.md", ""), ("docs/reference/b.md", "")]);
        let written = tree.written_in(Language::Markdown);
        let paths: Vec<&str> = written.map(|file| file.path.as_str()).collect();
        assert_eq!(paths, ["docs/a.md"]);
    }
}
