//! The manifest, which lists the files of a checkpoint and the tensors in them.

use crate::{
    Error,
    checksum::{combine, crc32c},
    shard_names::is_shard_name,
    slice::SliceEntry,
    tiling,
};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

/// The version of the format that this code writes for up to 256 ranks, and reads.
const FORMAT: u32 = 2;

/// The version in which shards are also in folders of their own, for more ranks.
const FORMAT_WITH_FOLDERS: u32 = 3;

/// The key of the manifest's own checksum: the CRC-32C of the other keys as compact JSON. Earlier
/// versions ignore the key.
const CHECKSUM_KEY: &str = "crc32c";

/// The contents of `manifest.json`.
#[derive(Debug, Clone, Serialize)]
pub struct Manifest {
    /// The version of the format.
    pub format: u32,
    /// Optimizer steps that were done.
    pub step: u64,
    /// Whatever the writer needs when it resumes, such as its configuration.
    pub state: Value,
    /// The shards, in the order of their numbers.
    pub files: Vec<FileEntry>,
    /// The tensors by their global names.
    pub tensors: BTreeMap<String, TensorEntry>,
}

/// A manifest with its checksum, as it is parsed.
#[derive(Deserialize)]
// A damaged name of the checksum's key must not turn the manifest into one without a checksum.
#[serde(deny_unknown_fields)]
struct Document {
    format: u32,
    step: u64,
    state: Value,
    files: Vec<FileEntry>,
    tensors: BTreeMap<String, TensorEntry>,
    #[serde(default, deserialize_with = "present")]
    crc32c: Option<Value>,
}

/// Deserializes a key that is present, so that its null differs from its absence.
fn present<'de, D: Deserializer<'de>>(value: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(value).map(Some)
}

/// A manifest that was read.
pub(crate) struct ParsedManifest {
    pub(crate) manifest: Manifest,
    /// The checksum, which manifests of earlier versions lack.
    pub(crate) checksum: Option<u32>,
}

impl Manifest {
    /// Creates a manifest in the oldest format that can name `files`.
    pub(crate) fn new(
        step: u64,
        state: Value,
        files: Vec<FileEntry>,
        tensors: BTreeMap<String, TensorEntry>,
    ) -> Manifest {
        let has_folders = files.iter().any(|file| file.name.contains('/'));
        Manifest {
            format: if has_folders {
                FORMAT_WITH_FOLDERS
            } else {
                FORMAT
            },
            step,
            state,
            files,
            tensors,
        }
    }

    /// Returns the text of the manifest with its checksum, and what it parses to.
    pub(crate) fn encode(self) -> (Vec<u8>, ParsedManifest) {
        let mut text = self.compact();
        let checksum = crc32c(&text);
        text.pop();
        text.extend(checksum_suffix(checksum).as_bytes());
        let parsed = ParsedManifest {
            manifest: self,
            checksum: Some(checksum),
        };
        (text, parsed)
    }

    /// Returns the text without the checksum, of which that is the checksum.
    fn compact(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("plain data")
    }

    /// Parses the text of the manifest `path`, and checks it against its checksum and itself.
    ///
    /// # Errors
    /// If it is damaged, of another format, names a file outside of its folder, or does not hold
    /// every element of every tensor once.
    pub(crate) fn parse(text: &[u8], path: &Path) -> Result<ParsedManifest, Error> {
        let damaged = |reason: String| Error::damaged(path, reason);
        let document = serde_json::from_slice(text);
        let Document {
            format,
            step,
            state,
            files,
            tensors,
            crc32c: saved,
        } = document.map_err(|error| refusal(text, path, &error))?;
        let manifest = Manifest {
            format,
            step,
            state,
            files,
            tensors,
        };
        let checksum = match saved {
            Some(saved) => Some(manifest.check_sum(text, &saved).map_err(damaged)?),
            None => None,
        };
        check_format(u64::from(format), path)?;
        manifest.check().map_err(damaged)?;
        Ok(ParsedManifest { manifest, checksum })
    }

    /// Compares the checksum in `text` with the other keys. Returns it.
    fn check_sum(&self, text: &[u8], saved: &Value) -> Result<u32, String> {
        let stated = saved.as_u64().and_then(|saved| u32::try_from(saved).ok());
        if let Some(stated) = stated
            && let Some(rest) = text.strip_suffix(checksum_suffix(stated).as_bytes())
            && combine(crc32c(rest), crc32c(b"}"), 1) == stated
        {
            return Ok(stated);
        }
        // Earlier versions write the same keys with indentation.
        let found = crc32c(&self.compact());
        if stated == Some(found) {
            return Ok(found);
        }
        Err(checksum_differs(found, saved))
    }

    /// Checks names, numbers of files, and that the slices of each tensor cover it exactly once.
    fn check(&self) -> Result<(), String> {
        let mut names = BTreeSet::new();
        let mut bytes = 0u64;
        let has_folders = self.format == FORMAT_WITH_FOLDERS;
        for FileEntry {
            name,
            bytes: of_file,
            ..
        } in &self.files
        {
            // Names reach the terminal.
            if !is_shard_name(name, has_folders) || has_control(name) {
                return Err(format!("{name:?} is no name of a shard in this folder"));
            }
            if !names.insert(name) {
                return Err(format!("{name} is listed twice"));
            }
            bytes = bytes.saturating_add(*of_file);
        }
        let mut elements = 0u64;
        for (name, entry) in &self.tensors {
            if has_control(name) {
                return Err(format!("{name:?} is no name of a tensor"));
            }
            let mut slices = entry.slices.iter();
            if let Some(slice) = slices.find(|slice| slice.file >= self.files.len()) {
                let file = slice.file;
                return Err(format!(
                    "{name} has a slice in shard {file}, which is not listed"
                ));
            }
            tiling::check_tiling(&entry.shape, &entry.slices)
                .map_err(|reason| format!("{name} {reason}"))?;
            let of_tensor = tiling::elements(&entry.shape).unwrap_or(0);
            elements = elements.saturating_add(of_tensor.unsigned_abs());
        }
        // Each element has at least one byte. Memory is reserved by the elements.
        if elements > bytes {
            return Err(format!(
                "{elements} values cannot be in shards of {bytes} bytes"
            ));
        }
        Ok(())
    }
}

fn has_control(name: &str) -> bool {
    name.chars().any(char::is_control)
}

/// Returns the end of a manifest that this version writes.
fn checksum_suffix(checksum: u32) -> String {
    format!(",\"{CHECKSUM_KEY}\":{checksum}}}")
}

fn checksum_differs(found: u32, saved: &Value) -> String {
    format!("its checksum is {found}, it says {saved}")
}

/// Returns why a text that `error` describes is no manifest: its checksum or its format says more.
fn refusal(text: &[u8], path: &Path, error: &serde_json::Error) -> Error {
    let invalid = Error::damaged(path, error.to_string());
    let Ok(mut document) = serde_json::from_slice::<Map<String, Value>>(text) else {
        return invalid;
    };
    if let Some(saved) = document.shift_remove(CHECKSUM_KEY) {
        let found = crc32c(&serde_json::to_vec(&document).expect("plain data"));
        if saved.as_u64() != Some(u64::from(found)) {
            return Error::damaged(path, checksum_differs(found, &saved));
        }
    }
    // A manifest without the key is invalid, which says so.
    let format = document.get("format").and_then(Value::as_u64);
    let format = format.unwrap_or(u64::from(FORMAT));
    check_format(format, path).err().unwrap_or(invalid)
}

fn check_format(format: u64, path: &Path) -> Result<(), Error> {
    let oldest = u64::from(FORMAT);
    let newest = u64::from(FORMAT_WITH_FOLDERS);
    let reason = if format > newest {
        format!("format {format} is newer than {newest}, which this version reads")
    } else if format < oldest {
        format!("format {format} is older than {oldest}, which this version reads")
    } else {
        return Ok(());
    };
    Err(Error::mismatch(path, reason))
}

/// A tensor and the slices in which it is stored.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorEntry {
    pub shape: Vec<i64>,
    /// Disjoint slices that cover the tensor. The serialized name is that of format 2.
    #[serde(rename = "pieces")]
    pub slices: Vec<SliceEntry>,
}

impl TensorEntry {
    /// Returns the number of elements of the tensor.
    pub(crate) fn elements(&self) -> u64 {
        self.shape.iter().map(|&size| size as u64).product()
    }
}

/// A shard of a checkpoint.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// The file's name in the folder of the checkpoint, `NAME` or `FOLDER/NAME`.
    pub name: String,
    pub bytes: u64,
    /// The CRC-32C of the whole file.
    pub crc32c: u32,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn manifest(state: Value) -> Manifest {
        let manifest = json!({
            "format": FORMAT,
            "step": 7,
            "state": state,
            "files": [{"name": "a", "bytes": 24, "crc32c": 1}],
            "tensors": {"w": {
                "shape": [2, 3],
                "pieces": [{"file": 0, "offset": [0, 0], "shape": [2, 3]}],
            }},
        });
        parse(&manifest).unwrap().manifest
    }

    fn parse(value: &Value) -> Result<ParsedManifest, Error> {
        Manifest::parse(&serde_json::to_vec(value).unwrap(), Path::new("m"))
    }

    fn refusal(value: &Value) -> String {
        parse(value).err().expect("refused").to_string()
    }

    /// Returns the manifest as an earlier version writes it, changed at `pointer`.
    fn without_checksum(pointer: &str, to: Value) -> Value {
        let mut value = serde_json::to_value(manifest(Value::Null)).unwrap();
        *value.pointer_mut(pointer).unwrap() = to;
        value
    }

    proptest! {
        #[test]
        fn any_state_has_a_matching_checksum(numbers in prop::collection::vec(any::<f64>(), 9)) {
            let manifest = manifest(json!({"numbers": numbers, "text": "\u{e9}\n"}));
            let parsed = Manifest::parse(&manifest.clone().encode().0, Path::new("m")).unwrap();
            prop_assert!(parsed.checksum.is_some());
            prop_assert_eq!(&parsed.manifest.state, &manifest.state);
        }
    }

    #[test]
    fn a_checksum_covers_every_key() {
        let good: Value = serde_json::from_slice(&manifest(json!({"x": 1})).encode().0).unwrap();
        assert!(parse(&good).unwrap().checksum.is_some());
        for (pointer, to) in [
            ("/step", json!(8)),
            ("/format", json!(4)),
            ("/state/x", json!(2)),
            ("/files/0/name", json!("b")),
            ("/tensors/w/pieces/0/offset/0", json!(1)),
            ("/crc32c", json!(null)),
            ("/crc32c", json!(1u64 << 32)),
        ] {
            let mut changed = good.clone();
            *changed.pointer_mut(pointer).unwrap() = to;
            let refused = refusal(&changed);
            assert!(
                refused.contains("m is damaged: its checksum is"),
                "{pointer}: {refused}"
            );
        }
        let renamed = good.to_string().replace("crc32c\":", "crc32b\":");
        let refused = Manifest::parse(renamed.as_bytes(), Path::new("m")).err();
        assert!(refused.is_some_and(|error| error.is_damage()));
    }

    /// Earlier versions write with indentation, and read with it or without.
    #[test]
    fn the_checksum_is_that_of_the_compact_text() {
        let manifest = manifest(json!({"x": [1.5, "y"], "empty": {}}));
        let text = manifest.encode().0;
        let value: Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(serde_json::to_vec(&value).unwrap(), text, "it is compact");
        let parsed = |text: &[u8]| Manifest::parse(text, Path::new("m")).unwrap();
        let indented = serde_json::to_vec_pretty(&value).unwrap();
        assert_eq!(parsed(&text).checksum, parsed(&indented).checksum);
        assert!(parsed(&text).checksum.is_some());
        assert_eq!(parsed(&indented).manifest.encode().0, text);
        let unknown = String::from_utf8(indented).unwrap();
        let unknown = unknown.replace("\"file\": 0", "\"file\": 0, \"fine\": 0");
        let refused = Manifest::parse(unknown.as_bytes(), Path::new("m"))
            .err()
            .unwrap();
        assert!(refused.is_damage(), "{refused}");
    }

    #[test]
    fn folders_of_shards_are_a_format_that_earlier_versions_refuse() {
        let mut manifest = manifest(Value::Null);
        manifest.files[0].name = "ranks-00256/a".into();
        assert!(refusal(&serde_json::to_value(&manifest).unwrap()).contains("no name of a shard"));
        let Manifest {
            step,
            state,
            files,
            tensors,
            ..
        } = manifest;
        let manifest = Manifest::new(step, state, files, tensors);
        assert_eq!(manifest.format, 3);
        assert!(Manifest::parse(&manifest.clone().encode().0, Path::new("m")).is_ok());
        for name in ["../a", "a/../b", "a//b", "/a", "a/b/c", "a/"] {
            let mut outside = manifest.clone();
            outside.files[0].name = name.into();
            let refused = refusal(&serde_json::to_value(&outside).unwrap());
            assert!(refused.contains("no name of a shard"), "{name}: {refused}");
        }
    }

    #[test]
    fn one_without_a_checksum_is_checked_against_itself() {
        let old = without_checksum("/step", json!(7));
        assert_eq!(parse(&old).unwrap().checksum, None);
        for (pointer, to, reason) in [
            ("/tensors/w/pieces/0/offset/0", json!(1), "not inside"),
            ("/tensors/w/pieces/0/shape/0", json!(1), "3 of 6 values"),
            ("/tensors/w/pieces/0/shape", json!([-2, 3]), "not inside"),
            (
                "/tensors/w/pieces/0/file",
                json!(8),
                "shard 8, which is not listed",
            ),
            ("/tensors/w/pieces", json!([]), "0 of 6 values"),
            (
                "/tensors/w/shape",
                json!([1u64 << 62, 9]),
                "impossible shape",
            ),
            (
                "/files/0/bytes",
                json!(5),
                "6 values cannot be in shards of 5 bytes",
            ),
            ("/files/0/name", json!("/dev/zero"), "no name of a shard"),
            ("/files/0/name", json!("../a"), "no name of a shard"),
            (
                "/files/0/name",
                json!("manifest.json"),
                "no name of a shard",
            ),
        ] {
            let refused = refusal(&without_checksum(pointer, to));
            assert!(refused.contains(reason), "{pointer}: {refused}");
        }
        let twice = json!([
            {"name": "a", "bytes": 24, "crc32c": 1},
            {"name": "a", "bytes": 0, "crc32c": 0},
        ]);
        assert!(refusal(&without_checksum("/files", twice)).contains("a is listed twice"));
    }
}
