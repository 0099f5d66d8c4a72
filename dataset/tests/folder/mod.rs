//! A folder with inputs, in which the program runs.

use serde_json::json;
use std::{
    collections::BTreeMap,
    fmt::Write,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_moerun-data");

const WORDS: [&str; 16] = [
    "the", "model", "reads", "a", "token", "and", "writes", "another", "größer", "模型", "🙂",
    "window", "of", "text", "in", "order",
];

pub(crate) struct Folder {
    folder: tempfile::TempDir,
}

impl Folder {
    pub(crate) fn new() -> Folder {
        let folder = tempfile::tempdir().unwrap();
        Folder { folder }
    }

    /// Returns a folder with `a.jsonl`, `b.jsonl`, ..., of `documents` documents each.
    pub(crate) fn with_corpus(files: usize, documents: usize) -> Folder {
        let folder = Folder::new();
        let mut state = 1u64;
        let mut random = |below: u64| {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (state >> 33) % below
        };
        for name in ["a", "b", "c"].iter().take(files) {
            let mut lines = String::new();
            for number in 0..documents {
                let mut text = format!("document {number}:");
                for _ in 0..random(80) {
                    let word = WORDS[random(16) as usize];
                    write!(text, " {word}{}", random(50)).unwrap();
                }
                writeln!(lines, "{}", json!({ "text": text })).unwrap();
            }
            std::fs::write(folder.path(&format!("{name}.jsonl")), lines).unwrap();
        }
        folder
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command
            .current_dir(self.folder.path())
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    pub(crate) fn command_prepare(
        &self,
        inputs: &[&str],
        output: &str,
        options: &[&str],
    ) -> Command {
        self.command(&[&["data", "prepare", "-o", output], inputs, options].concat())
    }

    pub(crate) fn prepare(&self, inputs: &[&str], output: &str, options: &[&str]) -> Output {
        self.succeed(&[&["data", "prepare", "-o", output], inputs, options].concat())
    }

    pub(crate) fn succeed(&self, arguments: &[&str]) -> Output {
        let output = self.command(arguments).output().unwrap();
        assert!(
            output.status.success(),
            "{arguments:?}: {}",
            stderr(&output)
        );
        output
    }

    /// Runs a command that must fail, and returns its message.
    pub(crate) fn fail(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).output().unwrap();
        assert!(
            !output.status.success(),
            "{arguments:?}: {}",
            stdout(&output)
        );
        stderr(&output)
    }
}

pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Returns the hashes of all files in a folder and in its folders.
pub(crate) fn contents(folder: &Path) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_string();
        if path.is_dir() {
            let inner = contents(&path).into_iter();
            found.extend(inner.map(|(inner, hash)| (format!("{name}/{inner}"), hash)));
        } else {
            let bytes = std::fs::read(&path).unwrap();
            found.insert(name, blake3::hash(&bytes).to_hex().to_string());
        }
    }
    found
}

/// Inverts the bits of `mask` in a byte of a file.
pub(crate) fn flip(path: &Path, at: usize, mask: u8) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[at] ^= mask;
    std::fs::write(path, bytes).unwrap();
}
