//! Documents from files and folders: plain text (one per file), JSONL (one per line) and Parquet
//! (one per row).

use crate::Error;
use std::{
    fs::File,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
};

/// Returns the files under `inputs` in a fixed order. Folders are searched for the extensions.
pub(crate) fn files(inputs: &[PathBuf], extensions: &[String]) -> Result<Vec<PathBuf>, Error> {
    let mut found = Vec::new();
    for input in inputs {
        let kind = std::fs::metadata(input).map_err(Error::io("cannot open", input))?;
        if kind.is_dir() {
            walk(input, extensions, &mut found)?;
        } else {
            found.push(input.clone());
        }
    }
    Ok(found)
}

fn walk(folder: &Path, extensions: &[String], found: &mut Vec<PathBuf>) -> Result<(), Error> {
    let entries = std::fs::read_dir(folder).map_err(Error::io("cannot open", folder))?;
    let mut paths = entries
        .map(|entry| entry.map(|e| e.path()))
        .collect::<Result<Vec<_>, _>>()
        .map_err(Error::io("cannot read", folder))?;
    paths.sort();
    for path in paths {
        if path.is_dir() {
            walk(&path, extensions, found)?;
        } else if extension(&path).is_some_and(|e| extensions.contains(&e)) {
            found.push(path);
        }
    }
    Ok(())
}

fn extension(path: &Path) -> Option<String> {
    Some(path.extension()?.to_str()?.to_lowercase())
}

/// Passes each document of a file to `take`.
///
/// `text_key` is the field of JSONL objects and the column of Parquet tables that holds the text.
pub(crate) fn read(
    path: &Path,
    text_key: &str,
    take: &mut dyn FnMut(String) -> Result<(), Error>,
) -> Result<(), Error> {
    match extension(path).as_deref() {
        Some("jsonl") => read_jsonl(path, text_key, take),
        Some("parquet") => parquet_rows::read(path, text_key, take),
        _ => {
            let bytes = std::fs::read(path).map_err(Error::io("cannot read", path))?;
            // A few invalid bytes do not make a text useless.
            take(String::from_utf8_lossy(&bytes).into_owned())
        }
    }
}

fn read_jsonl(
    path: &Path,
    text_key: &str,
    take: &mut dyn FnMut(String) -> Result<(), Error>,
) -> Result<(), Error> {
    let file = File::open(path).map_err(Error::io("cannot open", path))?;
    for (number, line) in BufReader::new(file).lines().enumerate() {
        let line = line.map_err(Error::io("cannot read", path))?;
        if line.trim().is_empty() {
            continue;
        }
        let failed = |cause: String| {
            let line = number + 1;
            Error::Data(format!("{}:{line}: {cause}", path.display()))
        };
        let value: serde_json::Value =
            serde_json::from_str(&line).map_err(|error| failed(format!("not JSON: {error}")))?;
        let text = value.get(text_key).and_then(|text| text.as_str());
        let text = text.ok_or_else(|| {
            failed(format!(
                "no text under the key {text_key:?} (choose another with --text-key)"
            ))
        })?;
        take(text.into())?;
    }
    Ok(())
}

mod parquet_rows {
    use super::{Error, File, Path};
    use parquet::{
        file::reader::{FileReader, SerializedFileReader},
        record::RowAccessor,
    };

    pub(crate) fn read(
        path: &Path,
        column: &str,
        take: &mut dyn FnMut(String) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let failed = |cause: String| Error::Data(format!("{}: {cause}", path.display()));
        let file = File::open(path).map_err(Error::io("cannot open", path))?;
        let reader = SerializedFileReader::new(file)
            .map_err(|error| failed(format!("not a Parquet file: {error}")))?;
        let schema = reader.metadata().file_metadata().schema_descr();
        let names: Vec<_> = schema
            .root_schema()
            .get_fields()
            .iter()
            .map(|field| field.name().to_string())
            .collect();
        let position = names
            .iter()
            .position(|name| name == column)
            .ok_or_else(|| {
                failed(format!(
                    "no column {column:?}, only {} (choose one with --text-key)",
                    names.join(", ")
                ))
            })?;
        let rows = reader
            .get_row_iter(None)
            .map_err(|error| failed(error.to_string()))?;
        for (number, row) in rows.enumerate() {
            let failed = |error| failed(format!("row {number}: {error}"));
            let row = row.map_err(failed)?;
            let text = row.get_string(position).map_err(failed)?;
            take(text.clone())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_jsonl_and_folders() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("b")).unwrap();
        std::fs::write(folder.path().join("b/two.txt"), "second").unwrap();
        std::fs::write(folder.path().join("a.txt"), "first").unwrap();
        std::fs::write(folder.path().join("skipped.png"), "no").unwrap();
        let lines = folder.path().join("lines.jsonl");
        std::fs::write(&lines, "{\"text\": \"third\"}\n\n{\"text\": \"fourth\"}\n").unwrap();
        let found = files(&[folder.path().into(), lines.clone()], &["txt".into()]).unwrap();
        let mut texts = Vec::new();
        for path in &found {
            read(path, "text", &mut |text| {
                texts.push(text);
                Ok(())
            })
            .unwrap();
        }
        assert_eq!(texts, ["first", "second", "third", "fourth"]);
        std::fs::write(&lines, "{\"text\": \"good\"}\n{\"body\": 1}\n").unwrap();
        let error = read(&lines, "text", &mut |_| Ok(()))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("lines.jsonl:2: no text under the key \"text\""),
            "{error}"
        );
    }
}
