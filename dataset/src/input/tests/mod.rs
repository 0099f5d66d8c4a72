//! Tests of reading files, through the interface that others use.

mod compressed;
mod discovery;
mod parquet;
mod properties;
mod rows;
mod texts;

use super::{InputCounts, InputOptions, find};
use crate::Error;
use std::path::Path;
use tempfile::TempDir;

/// Documents and counts of some inputs.
#[derive(Debug)]
struct Read {
    texts: Vec<String>,
    counts: InputCounts,
    notes: Vec<String>,
}

/// A folder of files.
struct Files(TempDir);

impl Files {
    fn new(files: &[(&str, &[u8])]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for (name, contents) in files {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, contents).unwrap();
        }
        Self(folder)
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().into()
    }

    /// Reads inputs in this folder.
    fn read(&self, names: &[&str], options: &InputOptions) -> Result<Read, Error> {
        let inputs: Vec<_> = names.iter().map(|name| self.path(name)).collect();
        read(&inputs, options)
    }
}

fn read(inputs: &[String], options: &InputOptions) -> Result<Read, Error> {
    let found = find(inputs, options)?;
    let mut read = Read {
        texts: Vec::new(),
        counts: found.counts,
        notes: found.notes,
    };
    let mut text = String::new();
    for file in found.files {
        file.read(options, &mut read.counts, &mut |piece| {
            text += piece.text;
            if piece.ends_document {
                read.texts.push(std::mem::take(&mut text));
            }
            Ok(())
        })?;
    }
    assert_eq!(text, "", "a document does not end");
    assert_eq!(read.counts.documents, read.texts.len() as u64);
    let bytes: usize = read.texts.iter().map(String::len).sum();
    assert_eq!(read.counts.bytes, bytes as u64);
    Ok(read)
}

/// Reads a single file.
fn read_one(name: &str, contents: &[u8], options: &InputOptions) -> Result<Read, Error> {
    Files::new(&[(name, contents)]).read(&[name], options)
}

fn with_key(key: &str) -> InputOptions {
    InputOptions {
        text_key: key.parse().unwrap(),
        ..InputOptions::default()
    }
}

/// Checks that an error names everything in `parts`.
#[track_caller]
fn assert_refused(result: Result<Read, Error>, parts: &[&str]) {
    let error = result.expect_err("it was read").to_string();
    for part in parts {
        assert!(error.contains(part), "{part:?} is not in {error:?}");
    }
}

/// Checks that strict mode refuses a file and names the place.
#[track_caller]
fn assert_strict(name: &str, contents: &[u8], options: &InputOptions, parts: &[&str]) {
    let strict = InputOptions {
        strict: true,
        ..options.clone()
    };
    assert_refused(read_one(name, contents, &strict), parts);
}

/// Returns the path of a file that pyarrow wrote.
fn golden(name: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/parquet");
    folder.join(name).to_str().unwrap().into()
}
